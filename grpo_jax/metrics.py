"""Metrics that add exactly: over tokens, microbatches, optimizer steps and devices.

A mean carries its count, so that the mean over a batch does not depend on how the batch was cut.
"""

from collections.abc import Mapping
from typing import Self, TypeAlias

import jax
import jax.numpy as jnp

from grpo_jax.types import record

__all__ = [
    "EffectiveSampleSize",
    "Max",
    "Mean",
    "Metric",
    "Metrics",
    "add",
    "empty",
    "finalize",
    "masked_mean",
    "merge",
]


class _Sums:
    """A metric whose fields add up."""

    def merge(self) -> Self:
        """Folds the leading axis."""
        return jax.tree.map(lambda x: x.sum(0), self)

    def empty(self) -> Self:
        """What merges with another and leaves it as it is."""
        return jax.tree.map(lambda _: jnp.zeros(()), self)


@record
class Mean(_Sums):
    """A mean, as its total and its count; 0 where nothing was counted."""

    total: jax.Array  # [] float32
    count: jax.Array  # [] float32

    def value(self) -> jax.Array:
        """The number to log, [] float32."""
        return self.total / jnp.maximum(self.count, 1e-30)


@record
class Max:
    """A maximum."""

    top: jax.Array  # [] float32

    def merge(self) -> "Max":
        """Folds the leading axis."""
        return Max(top=self.top.max(0))

    def empty(self) -> "Max":
        """What merges with another and leaves it as it is."""
        return Max(top=jnp.float32(-jnp.inf))

    def value(self) -> jax.Array:
        """The number to log, [] float32."""
        return self.top


@record
class EffectiveSampleSize(_Sums):
    r"""Kish's effective sample size, as a share: :math:`(\sum w)^2 / (n \sum w^2)`; 1 where all weights are equal."""

    total: jax.Array  # [] float32, sum of w
    squares: jax.Array  # [] float32, sum of their squares
    count: jax.Array  # [] float32, n

    def value(self) -> jax.Array:
        """The number to log, [] float32; 0 where nothing was counted."""
        return jnp.square(self.total) / jnp.maximum(self.count * self.squares, 1e-30)


Metric: TypeAlias = Mean | Max | EffectiveSampleSize
Metrics: TypeAlias = Mapping[str, Metric]


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """The mean of `values` where `mask` is true; values elsewhere may be anything, NaN too."""
    return Mean(total=jnp.where(mask, values, 0).sum(), count=mask.sum().astype(jnp.float32))


def merge(stacked: Metrics) -> dict[str, Metric]:
    """Folds the leading axis (data shards, or optimizer steps) of every metric."""
    return {name: metric.merge() for name, metric in stacked.items()}


def add(some: Metrics, others: Metrics) -> dict[str, Metric]:
    """Merges the metrics of two parts."""
    return merge(jax.tree.map(lambda *x: jnp.stack(x), some, others))


def empty(like: Metrics) -> dict[str, Metric]:
    """What `add` starts from, for metrics of these names and kinds."""
    return {name: metric.empty() for name, metric in like.items()}


def finalize(metrics: Metrics) -> dict[str, jax.Array]:
    """The numbers to log, {name: [] float32}."""
    return {name: metric.value() for name, metric in metrics.items()}
