"""The train step: minibatches and epochs over one rollout, microbatches inside, sharded over a mesh.

Pure functions; `make_train_step` is the composition point where jit, donation and shardings stand.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax import sharding
from grpo_jax.corrections import top_entropies
from grpo_jax.guard import guarded_update, skip_metrics
from grpo_jax.logprobs import row_logprobs
from grpo_jax.microbatches import Microbatches, frozen_logprobs, over_data, pack_microbatches
from grpo_jax.objectives import Objective
from grpo_jax.optimizers import HOST
from grpo_jax.packing import Rows
from grpo_jax.sharding import per_device
from grpo_jax.types import Array, Policy, PyTree, Rollout, Surplus, TrainBatch, TrainState, record

__all__ = [
    "UpdateConfig",
    "abstract_train_state",
    "check_divides",
    "check_reference",
    "init_train_state",
    "make_reference_logprobs",
    "make_train_step",
    "state_shardings",
    "summed_gradients",
    "train_batch",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    epochs: int = 1  # passes over the rollout (mu of the paper)
    minibatches: int = 1  # optimizer steps a pass
    microbatches: int = 1  # parts of a minibatch, one after the other; saves memory, and short completions fill fewer
    reference_every: int = 0  # steps after which the reference moves to the policy; 0: it stays
    reference_mix: float = 1.0  # how far it moves: 1 all the way, 0.5 half of it

    def __post_init__(self) -> None:
        if min(self.epochs, self.minibatches, self.microbatches) < 1:
            raise ValueError(
                f"epochs={self.epochs}, minibatches={self.minibatches} and microbatches={self.microbatches} must be 1 "
                "or more."
            )
        if self.reference_every < 0 or not 0 < self.reference_mix <= 1:
            raise ValueError(
                f"reference_every={self.reference_every} must be 0 or more, "
                f"reference_mix={self.reference_mix} in (0, 1]."
            )
        if self.reference_mix < 1 and not self.reference_every:
            raise ValueError(
                f"reference_mix={self.reference_mix} needs reference_every: how often the reference moves."
            )


def state_shardings(
    policy: Policy, optimizer: optax.GradientTransformation, abstract: TrainState, mesh: Mesh, offload: bool = False
) -> TrainState:
    """Where each leaf of a TrainState lies: optimizer moments as their parameters do, by the axes that they have.

    `offload`: moments lie in the memory of the host, each beside its device's; `make_train_step` sees it by `like`.
    """
    params = sharding.shardings(abstract.params, policy.param_axes, mesh)
    trained, _ = policy.split.parts(params)
    everywhere = sharding.replicated(mesh)

    def of_moment(moment, place: NamedSharding, param):
        where = _as_parameter(moment.shape, place, param.shape)
        return where.with_memory_kind(HOST) if offload else where

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        of_moment,
        abstract.opt_state,
        trained,
        policy.split.parts(abstract.params)[0],
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(
        params=params,
        reference=None if abstract.reference is None else params,
        opt_state=opt_state,
        step=everywhere,
        cursor=everywhere,
        surplus=jax.tree.map(lambda x: sharding.batch_sharding(mesh) if x.ndim else everywhere, abstract.surplus),
        skipped=None if abstract.skipped is None else everywhere,
    )


def _as_parameter(shape: tuple[int, ...], place: NamedSharding, of: tuple[int, ...]) -> NamedSharding:
    """Where something of this shape lies, which a parameter of shape `of` has: split as it is by the axes it has left.

    Factored moments are without one of its axes (which of two as long is no matter: either splits it), and what stands
    in the place of a moment that there is not has one element.
    """
    if shape == of:
        return place
    for axis in range(len(of)):
        if shape == of[:axis] + of[axis + 1 :]:
            return NamedSharding(place.mesh, PartitionSpec(*place.spec[:axis], *place.spec[axis + 1 :]))
    return NamedSharding(place.mesh, PartitionSpec())


def _initial(
    policy: Policy, params: PyTree, optimizer: optax.GradientTransformation, objective: Objective,
    surplus: Surplus | None,
) -> TrainState:  # fmt: skip
    # A weakly typed leaf would be one no more after an update, and all that takes parameters would compile twice.
    params = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), params)
    return TrainState(
        params=params,
        reference=params if objective.needs_reference and policy.split.reference is None else None,
        opt_state=optimizer.init(policy.split.parts(params)[0]),
        step=jnp.zeros((), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
        surplus=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), surplus),
        skipped=jnp.zeros((), jnp.int32),
    )


def abstract_train_state(
    policy: Policy, params: PyTree, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh,
    surplus: Surplus | None = None, offload: bool = False,
) -> TrainState:  # fmt: skip
    """Shapes and places of a state, from the shapes of its parameters: to compile for, or to restore; no memory.

    `surplus`: shapes of what steps leave to the next, `rollouts.surplus_of`; `offload`: see `state_shardings`.
    """
    abstract = jax.eval_shape(lambda p: _initial(policy, p, optimizer, objective, surplus), params)
    where = state_shardings(policy, optimizer, abstract, mesh, offload)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)


def init_train_state(
    policy: Policy, params: PyTree, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh,
    surplus: Surplus | None = None, offload: bool = False,
) -> TrainState:  # fmt: skip
    """The state before step 0, sharded over the mesh; `params` are copied, and become the reference too.

    Of a policy whose reference is in its parameters (`Split.reference`) there is no second copy.

    `surplus`: shapes of what steps leave to the next, `rollouts.surplus_of`; `offload`: see `state_shardings`.
    """
    abstract = abstract_train_state(policy, params, optimizer, objective, mesh, surplus, offload)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda p: _initial(policy, p, optimizer, objective, surplus), out_shardings=where)(params)


def train_batch(
    rollout: Rollout,
    advantages: jax.Array,
    *,
    temperature: float = 1.0,
    selected: jax.Array | None = None,
    ref_logprobs: jax.Array | None = None,
) -> TrainBatch:
    """Joins a rollout and its advantages into what a train step takes.

    Args:
      rollout: P prompts with G completions each.
      advantages: [P, G] or [B] float32, or of tokens, [B, T].
      temperature: at which the rollout was sampled.
      selected: [B] bool, the completions that train; None: all.
      ref_logprobs: [B, T] float32, of `make_reference_logprobs`; None: the update takes them where it needs them.

    Returns:
      TrainBatch of B = P·G completions.
    """
    completions, prompts = len(rollout.mask), len(rollout.prompt_mask)
    if advantages.size == completions:
        advantages = advantages.reshape(-1)
    else:
        chex.assert_equal_shape([advantages, rollout.mask])
    group = completions // prompts
    return TrainBatch(
        prompt_tokens=jnp.repeat(rollout.prompt_tokens, group, axis=0),
        prompt_mask=jnp.repeat(rollout.prompt_mask, group, axis=0),
        completion_tokens=rollout.completion_tokens,
        mask=rollout.mask if selected is None else rollout.mask & selected[:, None],
        advantages=advantages,
        sampler_logprobs=rollout.logprobs,
        temperature=jnp.full(completions, temperature, jnp.float32),
        ref_logprobs=ref_logprobs,
    )


def make_reference_logprobs(
    policy: Policy, update: UpdateConfig, mesh: Mesh
) -> Callable[[PyTree, Rollout, float], jax.Array]:
    """Compiles the pass of the reference: before there are rewards, so that the host can score them meanwhile.

    Args:
      policy: the model.
      update: as many completions at a time as in a microbatch.
      mesh: where rollout and parameters lie.

    Returns:
      `(params, rollout, temperature) -> logprobs [B, T] float32`, 0 where the rollout's mask is false; of a policy
      whose reference is in its parameters, these are the policy's.
    """
    parts, of = update.minibatches * update.microbatches, policy.split.reference or (lambda params: params)

    @jax.jit
    def logprobs(params, rollout: Rollout, temperature):
        check_divides(rollout.mask.shape[0], update, mesh)
        batch = train_batch(rollout, jnp.zeros(rollout.mask.shape[0]), temperature=temperature)
        return frozen_logprobs(policy, of(params), pack_microbatches(policy, batch, batch.mask, parts, mesh), mesh)[0]

    return logprobs


@record
class _Minibatch:
    """What one optimizer step learns from, [b, ...]; or a microbatch of it, by slots of its rows."""

    batch: TrainBatch
    old: Array | None  # [b, T] float32, log-probabilities before the first update; None: this is the first
    ref: Array | None  # [b, T] float32, the reference's; None: the loss does not ask
    learns: Array | None  # [b, T] bool, the tokens whose surrogate counts; None: all
    weights: Array  # [b, T] float32


def _loss_of(policy: Policy, objective: Objective, mesh: Mesh, params, rows: Rows, minibatch: _Minibatch, tokens):
    """(loss, metrics) of the packed rows of a microbatch, in which at most so many tokens of a device are asked for."""
    logprobs, entropies, aux = row_logprobs(policy, params, rows, count=tokens, mesh=mesh)
    # From here on by completions: [r W, T] for r rows a device.
    logprobs, entropies = (rows.slots(x, mesh) for x in (logprobs, entropies))
    m: _Minibatch = per_device(Rows.of_members, mesh)(rows, minibatch)
    mask, metrics, correction = m.batch.mask, {}, None
    if m.batch.sampler_logprobs is not None:
        old = logprobs if m.old is None else m.old
        weights, metrics = objective.correction(old, m.batch.sampler_logprobs, mask)
        correction = weights if objective.corrects else None
    if m.learns is not None:
        correction = jnp.where(m.learns, 1 if correction is None else correction, 0.0)
    loss, of_loss = objective.loss(
        logprobs, m.batch.advantages, mask, entropies=entropies, old_logprobs=m.old, ref_logprobs=m.ref,
        correction=correction, weights=m.weights,
    )  # fmt: skip
    filled = (rows.segments > 0).astype(jnp.float32)
    return loss, {
        **metrics,
        **of_loss,
        "entropy": metrics_lib.masked_mean(jax.lax.stop_gradient(entropies), mask),
        "packing/fill": metrics_lib.Mean(total=filled.sum(), count=jnp.float32(filled.size)),
        **{name: metrics_lib.Mean(total=total, count=count) for name, (total, count) in aux.items()},
    }


def summed_gradients(loss_of: Callable, mesh: Mesh, params, shard: Microbatches):
    """((loss, metrics), gradients) of a data shard, summed over its microbatches."""

    def of_part(i):
        part = shard.part(i, mesh), shard.of, shard.tokens[i]
        return jax.value_and_grad(loss_of, has_aux=True)(params, *part)

    def add(i, total):
        ((loss, metrics), grads), ((more, others), also) = total, of_part(i)
        return (loss + more, metrics_lib.add(metrics, others)), jax.tree.map(jnp.add, grads, also)

    if len(shard.tokens) == 1:
        return of_part(0)
    (_, metrics), _ = jax.eval_shape(of_part, 0)
    start = (jnp.zeros(()), metrics_lib.empty(metrics)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, shard.count, add, start)


def make_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    update: UpdateConfig = UpdateConfig(),
    *,
    like: TrainState,
    key: jax.Array,
    clip_norm: float = 0.0,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles the update of one rollout step.

    Short completions share rows, as many as the policy can tell apart, and only microbatches that hold any are run:
    what an update costs goes by real tokens, where there are several microbatches.

    Args:
      policy: the model.
      optimizer: an optax transformation.
      objective: what is minimized.
      update: epochs, minibatches and microbatches, and when the reference moves.
      like: a state, or ShapeDtypeStructs with shardings; what the step returns lies on the mesh as it does.
      key: typed key of the order of minibatches; not consumed, but folded with the step.
      clip_norm: the optimizer's, for the metric `grad_clipped`; 0: it does not clip.

    Returns:
      `train_step(state, batch) -> (state, metrics)`, jitted; the state is donated. The step count goes up
      by one; the cursor stays, since only the caller knows what the batch consumed. Metrics are
      {name: [] float32}, means over all tokens of all optimizer steps; and of optimizer steps `skipped`, how many,
      and `skipped_in_a_row`, see `guarded_update`.
      It raises ValueError where B does not divide into minibatches x microbatches x data x fsdp, or a correction finds
      no log-probabilities of the sampler.

    Raises:
      ValueError: a reference is to move, and the objective has none.
    """
    check_reference(objective, update, policy)
    where = jax.tree.map(lambda x: x.sharding, like)
    mesh = where.step.mesh
    optimizer_steps = update.epochs * update.minibatches

    def optimizer_step(params, frozen, opt_state, skipped, minibatch: _Minibatch):
        loss_of = lambda params, *part: _loss_of(policy, objective, mesh, policy.split.join(params, frozen), *part)
        gradients = functools.partial(summed_gradients, loss_of, mesh)
        microbatches = pack_microbatches(policy, minibatch.batch, minibatch, update.microbatches, mesh)
        # Each data shard sums over its own microbatches; then one reduction over data, and not one a microbatch.
        (loss, metrics), grads = over_data(gradients, params, microbatches)
        loss, metrics, grads = loss.sum(), metrics_lib.merge(metrics), jax.tree.map(lambda x: x.sum(0), grads)
        updated = guarded_update(
            optimizer, params, opt_state, skipped, loss, grads, where=where.opt_state, clip_norm=clip_norm
        )
        return dataclasses.replace(updated, metrics={**metrics, **updated.metrics})

    def train_step(state: TrainState, batch: TrainBatch):
        check_divides(batch.mask.shape[0], update, mesh)
        if objective.corrects and batch.sampler_logprobs is None:
            raise ValueError(
                "the objective's correction needs the sampler's log-probabilities, and the batch has none."
            )
        batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(mesh))
        ref, batch = batch.ref_logprobs, dataclasses.replace(batch, ref_logprobs=None)
        old, learns = None, None
        parts = update.minibatches * update.microbatches
        packed = functools.cache(lambda: pack_microbatches(policy, batch, batch.mask, parts, mesh))  # once for both
        if objective.reference_in_loss and ref is None:
            of = policy.split.reference
            reference = state.reference if of is None else of(state.params)
            ref, _ = frozen_logprobs(policy, reference, packed(), mesh)
        # With a single update the old policy is the one that is differentiated: no pass is spent on it.
        if optimizer_steps > 1 or objective.top_entropy < 1:
            old, entropies = frozen_logprobs(policy, state.params, packed(), mesh)
            if objective.top_entropy < 1:
                learns = top_entropies(entropies, batch.mask, objective.top_entropy)

        def one(carry, order):
            take = lambda tree: jax.tree.map(lambda x: x[order], tree) if update.minibatches > 1 else tree
            (params, opt_state, skipped), b = carry, take(batch)
            minibatch = _Minibatch(
                batch=b, old=take(old), ref=take(ref), learns=take(learns), weights=objective.token_weights(b.mask)
            )
            updated = optimizer_step(params, frozen, opt_state, skipped, minibatch)
            return (updated.params, updated.opt_state, updated.skipped), (updated.metrics, updated.skipped)

        orders = _orders(jax.random.fold_in(key, state.step), batch.mask.shape[0], update)
        trained, frozen = policy.split.parts(state.params)
        before = jnp.int32(0) if state.skipped is None else state.skipped
        carry, (metrics, skipped) = jax.lax.scan(one, (trained, state.opt_state, before), orders)
        trained, opt_state, after = carry
        state = dataclasses.replace(
            state, params=policy.split.join(trained, frozen), opt_state=opt_state, step=state.step + 1,
            skipped=None if state.skipped is None else after,
        )  # fmt: skip
        state = dataclasses.replace(state, reference=_moved_reference(state, update))
        return state, {**metrics_lib.finalize(metrics_lib.merge(metrics)), **skip_metrics(skipped)}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


def _moved_reference(state: TrainState, update: UpdateConfig) -> PyTree:
    """The reference after a step: where it was or, every so many steps, on its way to the policy."""
    if not update.reference_every:
        return state.reference
    towards = lambda ref, new: (1 - update.reference_mix) * ref + update.reference_mix * new
    mixed = lambda: jax.tree.map(towards, state.reference, state.params)
    return jax.lax.cond(state.step % update.reference_every == 0, mixed, lambda: state.reference)


def _orders(key: jax.Array, completions: int, update: UpdateConfig) -> jax.Array:
    """[epochs * minibatches, b]: which completions make each minibatch; a new permutation every epoch."""
    permute = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), completions))
    return permute(jnp.arange(update.epochs)).reshape(update.epochs * update.minibatches, -1)


def check_reference(objective: Objective, update: UpdateConfig, policy: Policy) -> None:
    """Raises ValueError where a reference is to move that there is not, or that lies in the policy's parameters."""
    if update.reference_every and not objective.needs_reference:
        raise ValueError(
            f"reference_every={update.reference_every}: the objective has no reference that could move. Give the loss "
            "a kl_coef above 0, or leave it out."
        )
    if update.reference_every and policy.split.reference is not None:
        raise ValueError(
            f"reference_every={update.reference_every}: with adapters (LoRA) the reference is the model without them, "
            "of which there is no copy that could move. Leave it out, or train all parameters."
        )


def check_divides(completions: int, update: UpdateConfig, mesh: Mesh) -> None:
    """Raises ValueError where the completions of a step do not divide into equal parts."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = update.minibatches * update.microbatches * shards
    if completions % parts:
        raise ValueError(
            f"{completions} completions a step do not divide into minibatches={update.minibatches} x "
            f"microbatches={update.microbatches} x {shards} devices (data x fsdp) = {parts} equal parts. "
            "Change the prompts a step or the group size, or one of these."
        )
