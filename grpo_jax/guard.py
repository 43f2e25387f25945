"""What stands between a NaN and the parameters: an optimizer step that is not finite is left out, and counted."""

import jax
import jax.numpy as jnp
import optax

from grpo_jax.metrics import Mean, Metric
from grpo_jax.optimizers import brought_over
from grpo_jax.types import Array, PyTree, record

__all__ = ["NotFiniteError", "Updated", "guarded_update", "skip_metrics"]


class NotFiniteError(RuntimeError):
    """Too many optimizer steps in a row were not finite."""


@record
class Updated:
    """What an optimizer step makes."""

    params: PyTree
    opt_state: PyTree
    skipped: Array  # [] int32, optimizer steps in a row that were skipped, this one included
    metrics: dict[str, Metric]


def guarded_update(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree, skipped: Array | None,
    loss: Array, grads: PyTree, *, where: PyTree = None, clip_norm: float = 0.0,
) -> Updated:  # fmt: skip
    """An optimizer step, or none where NaN or inf is in the loss, the gradient or the parameters that it would make.

    A step that is skipped leaves parameters, moments and counts as they were, to the bit.

    Args:
      optimizer: an optax transformation.
      params: of the model.
      opt_state: the optimizer's.
      skipped: [] int32, how many were skipped in a row before; None: 0.
      loss: [] float32.
      grads: like `params`.
      where: shardings of `opt_state`, which may lie in the host's memory; None: on the devices.
      clip_norm: the optimizer's, for the metric `grad_clipped`; 0: it does not clip.

    Returns:
      Updated, with the metrics `loss`, `grad_norm` and `grad_clipped`, as they are, finite or not.
    """
    update = lambda opt_state: _update(optimizer, params, opt_state, skipped, loss, grads, clip_norm)
    return brought_over(update, opt_state, where, grads)


def _update(optimizer, params, opt_state, skipped, loss, grads, clip_norm) -> Updated:
    norm, once = optax.tree.norm(grads), lambda x: Mean(total=x.astype(jnp.float32), count=jnp.ones(()))

    def step(grads, opt_state, params):
        updates, moved = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), moved

    # What decides is made for all arrays before the first is replaced. Made again, behind a barrier, what replaces them
    # needs no memory: to keep it until then would take as much as the state.
    tried, _ = step(*jax.lax.optimization_barrier((grads, opt_state, params)))
    finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, norm, *jax.tree.leaves(tried))]).all()
    after, moved = step(grads, opt_state, params)
    keep = lambda new, old: jnp.where(finite, new, old)
    metrics: dict[str, Metric] = {"loss": once(loss), "grad_norm": once(norm)}
    if clip_norm:
        metrics["grad_clipped"] = once(norm > clip_norm)
    return Updated(
        params=jax.tree.map(keep, after, params),
        opt_state=jax.tree.map(keep, moved, opt_state),
        skipped=jnp.where(finite, 0, (0 if skipped is None else skipped) + 1).astype(jnp.int32),
        metrics=metrics,
    )


def skip_metrics(skipped: Array) -> dict[str, jax.Array]:
    """What the log says of optimizer steps, from `Updated.skipped` of each of a rollout step, [n] int32.

    In a row: the most that there were, those of steps before included.
    """
    return {
        "skipped": (skipped > 0).sum().astype(jnp.float32),
        "skipped_in_a_row": skipped.max().astype(jnp.float32),
    }
