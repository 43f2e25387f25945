r"""Reward models: a score of a sequence of tokens, and how preferences teach it (pure).

A reward model is a `Policy` whose `head` has width 1. The score of a sequence is that of its last token, which has seen
all others: :math:`r(x, y) = w \cdot h_{last}`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import metrics as metrics_lib
from grpo_jax import sharding
from grpo_jax.guard import guarded_update, skip_metrics
from grpo_jax.logprobs import unembed
from grpo_jax.memory import most_alive, parts_that_fit
from grpo_jax.metrics import Metrics, masked_mean
from grpo_jax.microbatches import Microbatches, over_data, over_parts, pack_microbatches
from grpo_jax.packing import Rows, take_columns
from grpo_jax.sharding import per_device
from grpo_jax.training import summed_gradients
from grpo_jax.types import Array, Policy, PyTree, TrainBatch, TrainState, record

__all__ = ["PairLoss", "Pairs", "bradley_terry", "make_pair_step", "scored_tokens", "scores"]

# (scores of the chosen [n], of the rejected [n], margins [n]) -> (loss, metrics)
PairLoss = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Metrics]]


@record
class Pairs:
    """Preferences, n of them: of two sequences one is chosen, and the other rejected."""

    tokens: Array  # [2n, S] int32: pair i is 2i, which is chosen, and 2i + 1
    mask: Array  # [2n, S] bool, true on a prefix of each
    margins: Array  # [n] float32, by how much the chosen should be ahead


def bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margins: jax.Array | None = None, *, center_coef: float = 0.0
) -> tuple[jax.Array, Metrics]:
    r"""The negative log-likelihood of preferences under Bradley and Terry's model (Biometrika 39, 1952).

    .. math:: L = \frac1n \sum_i -\log\sigma(r_i^+ - r_i^- - m_i) + \lambda (r_i^+ + r_i^-)^2

    as InstructGPT has it (arXiv 2203.02155, eq. 1), with the margins of Llama 2 (arXiv 2307.09288, eq. 2). The loss
    knows differences alone; the second term (Helping or Herding?, arXiv 2312.09244, eq. 3) says where 0 is. The
    equation is that of TRL's `center_rewards_coefficient`.

    Args:
      chosen: [n] float32, r of the sequences that are preferred.
      rejected: [n] float32, of the others.
      margins: [n] float32; None: 0.
      center_coef: lambda.

    Returns:
      The loss, [] float32, and metrics: `accuracy`, where the chosen is ahead (a tie counts half); `margin`, by how
      much it is, `reward/chosen` and `reward/rejected`, means; `calibration`, the mean of :math:`\sigma(|r^+ - r^-|)`,
      what the model takes its accuracy for.
    """
    margins = jnp.zeros_like(chosen) if margins is None else margins
    chex.assert_equal_shape([chosen, rejected, margins])
    chex.assert_rank(chosen, 1)
    ahead, everywhere = chosen - rejected, jnp.ones(chosen.shape, bool)
    loss = (-jax.nn.log_sigmoid(ahead - margins) + center_coef * jnp.square(chosen + rejected)).mean()
    means = {
        "accuracy": (1 + jnp.sign(ahead)) / 2, "margin": ahead, "reward/chosen": chosen, "reward/rejected": rejected,
        "calibration": jax.nn.sigmoid(jnp.abs(ahead)),
    }  # fmt: skip
    return loss, {name: masked_mean(values, everywhere) for name, values in means.items()}


def scored_tokens(tokens: jax.Array, mask: jax.Array, pad_id: int | None) -> jax.Array:
    """The tokens of each sequence through the one that is scored, [B, S] bool.

    That is the last which is not `pad_id`, as `transformers` finds it, also where padding is what ends a text: the end
    is left out then. None: the last there is. The padding of our arrays is where the mask is false, whatever it holds.
    """
    counts = mask if pad_id is None else mask & (tokens != pad_id)
    after = jnp.flip(jnp.cumsum(jnp.flip(counts, axis=1), axis=1), axis=1)  # of these, from here on
    # Where there is nothing else, transformers asks at the first.
    first = jnp.cumsum(mask, axis=1) == 1
    return mask & ((after > 0) | first)


def scores(
    policy: Policy, params: PyTree, tokens: jax.Array, mask: jax.Array, *, mesh: Mesh, pad_id: int | None = None,
    room: float = math.inf,
) -> jax.Array:  # fmt: skip
    """Scores of sequences, without a gradient: sharded over the mesh, and in as many parts as the memory asks for.

    Short sequences share rows, as in an update, so that what it costs goes by real tokens.

    Args:
      policy: whose head has width 1.
      params: of the policy.
      tokens: [B, S] int32; B divides over data x fsdp.
      mask: [B, S] bool, true on a prefix of each.
      mesh: where they lie.
      pad_id: see `scored_tokens`.
      room: bytes of a device that there are beside the parameters.

    Returns:
      [B] float32; 0 where the mask is false everywhere.
    """
    chex.assert_equal_shape([tokens, mask])
    parts = _parts(policy, params, tokens.shape, mesh, room, _forward)
    return _frozen(policy, params, _pack(policy, tokens, scored_tokens(tokens, mask, pad_id), parts, mesh), mesh)


def make_pair_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss: PairLoss = bradley_terry,
    *,
    like: TrainState,
    pad_id: int | None = None,
    room: float = math.inf,
    clip_norm: float = 0.0,
) -> Callable[[TrainState, Pairs], tuple[TrainState, dict[str, jax.Array]]]:
    r"""Compiles an optimizer step on preferences, of the signature that `loop.train` wants.

    .. math:: \nabla L(r) = \sum_b \frac{\partial L}{\partial r_b} \nabla r_b

    The scores of the whole batch are taken first, without a gradient, then the loss and its derivative by each, and
    then the sum is made in microbatches: which sequences share a row or a device does not matter, least of all that
    both of a pair do, and nothing depends on how the batch is cut. The price is one forward pass more; what short
    sequences save by sharing rows is mostly more than that.

    Args:
      policy: whose head has width 1.
      optimizer: an optax transformation.
      loss: what is minimized.
      like: a state, or ShapeDtypeStructs with shardings; what the step returns lies on the mesh as it does.
      pad_id: see `scored_tokens`.
      room: bytes of a device that there are beside the state; it decides about microbatches.
      clip_norm: the optimizer's, for the metric `grad_clipped`; 0: it does not clip.

    Returns:
      `step(state, pairs) -> (state, metrics)`, jitted; the state is donated. It raises ValueError where the sequences
      of the pairs do not divide over data x fsdp.
    """
    where = jax.tree.map(lambda x: x.sharding, like)
    mesh = where.step.mesh

    def of_part(params, rows: Rows, of: PyTree, tokens):
        del tokens
        values = _row_scores(policy, params, rows, mesh)
        return (per_device(Rows.of_members, mesh)(rows, of).reshape(values.shape) * values).sum(), {}

    def step(state: TrainState, pairs: Pairs):
        pairs = jax.lax.with_sharding_constraint(pairs, sharding.batch_sharding(mesh))
        parts = _parts(policy, state.params, pairs.tokens.shape, mesh, room, _backward)
        mask = scored_tokens(pairs.tokens, pairs.mask, pad_id)
        microbatches = _pack(policy, pairs.tokens, mask, parts, mesh)
        of_scores = lambda r: loss(r[0::2], r[1::2], pairs.margins)
        values = _frozen(policy, state.params, microbatches, mesh)
        (value, metrics), derivatives = jax.value_and_grad(of_scores, has_aux=True)(values)
        microbatches = dataclasses.replace(microbatches, of=derivatives.reshape(microbatches.of.shape))
        _, grads = over_data(functools.partial(summed_gradients, of_part, mesh), state.params, microbatches)
        grads = jax.tree.map(lambda x: x.sum(0), grads)
        updated = guarded_update(
            optimizer, state.params, state.opt_state, state.skipped, value, grads, where=where.opt_state,
            clip_norm=clip_norm,
        )  # fmt: skip
        skipped = None if state.skipped is None else updated.skipped
        state = dataclasses.replace(
            state, params=updated.params, opt_state=updated.opt_state, step=state.step + 1, skipped=skipped
        )
        finished = metrics_lib.finalize({**metrics, **updated.metrics})
        return state, {**finished, **skip_metrics(updated.skipped[None])}

    return jax.jit(step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


# Rows -------------------------------------------------------------------------------------------------


def _pack(policy: Policy, tokens: jax.Array, mask: jax.Array, parts: int, mesh: Mesh) -> Microbatches:
    """Sequences as completions of empty prompts; `of` is a number of each."""
    count = len(tokens)
    lines = TrainBatch(
        prompt_tokens=tokens[:, :0], prompt_mask=mask[:, :0], completion_tokens=tokens, mask=mask,
        advantages=jnp.zeros(count), sampler_logprobs=None, temperature=jnp.ones(count),
    )  # fmt: skip
    return pack_microbatches(policy, lines, jnp.zeros(count), parts, mesh)


def _row_scores(policy: Policy, params: PyTree, rows: Rows, mesh: Mesh | None) -> jax.Array:
    """[r, W] float32: of what is in each slot of a row; anything where nothing is."""
    hidden, _ = policy.hidden(params, rows.tokens, rows.positions, rows.segments)
    slots = jnp.arange(1, rows.members.shape[1] + 1, dtype=rows.segments.dtype)
    lengths = (rows.segments[:, None, :] == slots[None, :, None]).sum(axis=2)
    last = jnp.maximum(rows.starts + lengths - 1, 0)  # there are no prompts: targets stand where tokens do
    last = jnp.minimum(last, rows.segments.shape[1] - 1)
    return unembed(take_columns(hidden, last, mesh), policy.head(params))[..., 0]


def _frozen(policy: Policy, params: PyTree, microbatches: Microbatches, mesh: Mesh) -> jax.Array:
    """[B] float32, without a gradient."""

    def of_members(members, values):
        return jnp.zeros(len(members)).at[members.reshape(-1)].set(values.reshape(-1), mode="drop")

    def of_shard(params, shard: Microbatches):
        of_part = lambda rows, i: (_row_scores(policy, params, rows, mesh),)
        members = shard.rows.members
        (values,) = over_parts(of_part, shard, mesh, (jnp.zeros(members.shape),))
        return per_device(of_members, mesh)(members, values)

    return jax.lax.stop_gradient(over_data(of_shard, params, microbatches).reshape(-1))


# Microbatches -----------------------------------------------------------------------------------------


def _forward(policy: Policy, params: PyTree, rows: jax.Array) -> jax.Array:
    return policy.hidden(params, rows, rows, rows)[0].sum()


def _backward(policy: Policy, params: PyTree, rows: jax.Array) -> PyTree:
    return jax.grad(lambda params: _forward(policy, params, rows))(params)


def _parts(policy: Policy, params: PyTree, shape: tuple[int, ...], mesh: Mesh, room: float, a_pass: Callable) -> int:
    """Into how many microbatches [B, S] is cut, by what `a_pass` over the rows of a device needs.

    Raises:
      ValueError: B does not divide over data x fsdp.
    """
    count, columns = shape
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % shards:
        raise ValueError(f"{count} sequences do not divide over {shards} devices (data x fsdp): make it a multiple.")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def bytes_of(rows: int) -> int:
        # All devices along fsdp and data compute so many rows each, and the policy may split only these together.
        ids = jax.ShapeDtypeStruct((rows * mesh.shape["fsdp"], columns), jnp.int32)
        jaxpr = jax.make_jaxpr(functools.partial(a_pass, policy))(shapes, ids).jaxpr
        return most_alive(jaxpr) // (mesh.shape["fsdp"] * mesh.shape["tensor"])

    return parts_that_fit(count // shards, columns, bytes_of, room)
