"""Metrics that add exactly: over tokens, microbatches, optimizer steps and devices.

A mean carries its count, so that the mean over a batch does not depend on how the batch was cut.
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from grpo_jax.types import record

__all__ = ["Max", "Mean", "Metrics", "finalize", "masked_mean", "merge"]


@record
class Mean:
    """A mean, as its total and its count; 0 where nothing was counted."""

    total: jax.Array  # [] float32
    count: jax.Array  # [] float32

    def merge(self) -> "Mean":
        """Folds the leading axis."""
        return Mean(total=self.total.sum(0), count=self.count.sum(0))

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

    def value(self) -> jax.Array:
        """The number to log, [] float32."""
        return self.top


Metrics: TypeAlias = Mapping[str, Mean | Max]


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """The mean of `values` where `mask` is true; values elsewhere may be anything, NaN too."""
    return Mean(total=jnp.where(mask, values, 0).sum(), count=mask.sum().astype(jnp.float32))


def merge(stacked: Metrics) -> dict[str, Mean | Max]:
    """Folds the leading axis (microbatches, or optimizer steps) of every metric."""
    return {name: metric.merge() for name, metric in stacked.items()}


def finalize(metrics: Metrics) -> dict[str, jax.Array]:
    """The numbers to log, {name: [] float32}."""
    return {name: metric.value() for name, metric in metrics.items()}
