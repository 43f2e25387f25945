"""The train step: minibatches and epochs over one rollout, microbatches inside, sharded over a mesh.

Pure functions; `make_train_step` is the composition point where jit, donation and shardings stand.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax import sharding
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.objectives import Objective
from grpo_jax.types import Policy, PyTree, Rollout, TrainBatch, TrainState

__all__ = [
    "OptimizerConfig",
    "UpdateConfig",
    "abstract_train_state",
    "check_divides",
    "init_train_state",
    "make_optimizer",
    "make_train_step",
    "state_shardings",
    "train_batch",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 1e-6  # at its peak
    warmup_steps: int = 10  # optimizer steps, linear from 0
    decay: str = "constant"  # after the warm-up: constant, linear or cosine to 0 at the end
    clip_norm: float = 1.0  # 0 = no clipping
    b1: float = 0.9  # decay of Adam's mean of gradients
    b2: float = 0.98  # decay of Adam's mean of squares
    epsilon: float = 1e-8  # in Adam's denominator
    weight_decay: float = 0.0  # a step, times the learning rate

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r} must be 'constant', 'linear' or 'cosine'.")
        if self.learning_rate < 0 or self.clip_norm < 0 or self.warmup_steps < 0:
            raise ValueError(f"{self}: learning_rate, clip_norm and warmup_steps must be 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    epochs: int = 1  # passes over the rollout (mu of the paper)
    minibatches: int = 1  # optimizer steps a pass
    microbatches: int = 1  # parts of a minibatch, one after the other; saves memory, changes nothing

    def __post_init__(self) -> None:
        if min(self.epochs, self.minibatches, self.microbatches) < 1:
            raise ValueError(f"{self}: epochs, minibatches and microbatches must be 1 or more.")


def make_optimizer(config: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax optimizer of a configuration, and its learning rate as a function of the optimizer step."""
    peak, rest = config.learning_rate, max(total_steps - config.warmup_steps, 1)
    tails = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps) if config.warmup_steps else tails[config.decay]()
    schedule = optax.join_schedules([warmup, tails[config.decay]()], [config.warmup_steps])
    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw), schedule


def state_shardings(
    policy: Policy, optimizer: optax.GradientTransformation, abstract: TrainState, mesh: Mesh
) -> TrainState:
    """Where each leaf of a TrainState lies: optimizer moments lie as their parameters do."""
    params = sharding.shardings(abstract.params, policy.param_axes, mesh)
    everywhere = sharding.replicated(mesh)
    return TrainState(
        params=params,
        reference=None if abstract.reference is None else params,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer, lambda _, s: s, abstract.opt_state, params, transform_non_params=lambda _: everywhere
        ),
        step=everywhere,
        cursor=everywhere,
    )


def _initial(params: PyTree, optimizer: optax.GradientTransformation, objective: Objective) -> TrainState:
    return TrainState(
        params=params,
        reference=params if objective.needs_reference else None,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def abstract_train_state(
    policy: Policy, params: PyTree, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh
) -> TrainState:
    """Shapes and places of a state, from the shapes of its parameters: to compile for, or to restore; no memory."""
    abstract = jax.eval_shape(lambda p: _initial(p, optimizer, objective), params)
    where = state_shardings(policy, optimizer, abstract, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, where)


def init_train_state(
    policy: Policy, params: PyTree, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh
) -> TrainState:
    """The state before step 0, sharded over the mesh; `params` are copied, and become the reference too."""
    abstract = abstract_train_state(policy, params, optimizer, objective, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda p: _initial(p, optimizer, objective), out_shardings=where)(params)


def train_batch(
    rollout: Rollout,
    advantages: jax.Array,
    *,
    temperature: float = 1.0,
    selected: jax.Array | None = None,
) -> TrainBatch:
    """Joins a rollout and its advantages into what a train step takes.

    Args:
      rollout: P prompts with G completions each.
      advantages: [P, G] float32.
      temperature: at which the rollout was sampled.
      selected: [B] bool, the completions that train; None: all.

    Returns:
      TrainBatch of B = P·G completions.
    """
    prompts, group = advantages.shape
    chex.assert_shape(rollout.mask, (prompts * group, None))
    return TrainBatch(
        prompt_tokens=jnp.repeat(rollout.prompt_tokens, group, axis=0),
        prompt_mask=jnp.repeat(rollout.prompt_mask, group, axis=0),
        completion_tokens=rollout.completion_tokens,
        mask=rollout.mask if selected is None else rollout.mask & selected[:, None],
        advantages=advantages.reshape(-1),
        sampler_logprobs=rollout.logprobs,
        temperature=jnp.full(prompts * group, temperature, jnp.float32),
    )


def _split(tree: PyTree, parts: int) -> PyTree:
    """[b, ...] -> [parts, b / parts, ...], strided, so that rows stay on the device that holds them."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def make_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    update: UpdateConfig = UpdateConfig(),
    *,
    like: TrainState,
    key: jax.Array,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles the update of one rollout step.

    Args:
      policy: the model.
      optimizer: an optax transformation.
      objective: what is minimized.
      update: epochs, minibatches and microbatches.
      like: a state, or ShapeDtypeStructs with shardings; what the step returns lies on the mesh as it does.
      key: typed key of the order of minibatches; not consumed, but folded with the step.

    Returns:
      `train_step(state, batch) -> (state, metrics)`, jitted; the state is donated. The step count goes up
      by one; the cursor stays, since only the caller knows what the batch consumed. Metrics are
      {name: [] float32}, means over all tokens of all optimizer steps.
      It raises ValueError where B does not divide into minibatches x microbatches x data x fsdp.
    """
    where = jax.tree.map(lambda x: x.sharding, like)
    mesh = where.step.mesh
    optimizer_steps = update.epochs * update.minibatches
    rows = PartitionSpec(sharding.BATCH_AXES)

    def logprobs_of(params, b: TrainBatch, count):
        return completion_logprobs(
            policy, params, b.prompt_tokens, b.prompt_mask, b.completion_tokens, b.mask, b.temperature[:, None],
            count=count, mesh=mesh,
        )  # fmt: skip

    def most_tokens(mask, parts):
        """The most tokens that any device trains in any of the parts that each data shard is split into, []."""
        lengths = mask.sum(axis=1).reshape(mesh.shape["data"], -1, parts).swapaxes(1, 2)
        return lengths.reshape(*lengths.shape[:2], mesh.shape["fsdp"], -1).sum(axis=-1).max()

    def over_data(function, params, batch, count):
        """`function(params, shard, count)` for each data shard, as an axis of the arrays: [data, b / data, ...].

        So nothing is reduced over data inside of `function`, and only rows over fsdp are left for it to split.
        """
        data = mesh.shape["data"]
        parts = jax.tree.map(lambda x: x.reshape(data, x.shape[0] // data, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec("data", "fsdp")))
        return jax.vmap(function, (None, 0, None), spmd_axis_name="data")(params, parts, count)

    def frozen_logprobs(params, batch: TrainBatch):
        """[B, T] under fixed parameters, a microbatch at a time."""

        parts = update.minibatches * update.microbatches

        def of_shard(params, shard, count):
            logprobs = jax.lax.map(lambda b: logprobs_of(params, b, count)[0], _split(shard, parts))
            return logprobs.swapaxes(0, 1).reshape(shard.mask.shape)

        logprobs = over_data(of_shard, params, batch, most_tokens(batch.mask, parts))
        return jax.lax.stop_gradient(logprobs.reshape(batch.mask.shape))

    def loss_of(params, part, count):
        b, old, ref, weights = part
        logprobs, entropies, aux = logprobs_of(params, b, count)
        loss, metrics = objective.loss(
            logprobs, b.advantages, b.mask, entropies=entropies, old_logprobs=old, ref_logprobs=ref, weights=weights
        )
        extra: dict[str, metrics_lib.Mean | metrics_lib.Max] = {
            "entropy": metrics_lib.masked_mean(jax.lax.stop_gradient(entropies), b.mask)
        }
        if optimizer_steps == 1:
            extra |= _mismatch(logprobs, b)
        extra |= {name: metrics_lib.Mean(total=total, count=count) for name, (total, count) in aux.items()}
        return loss, {**metrics, **extra}

    def gradients(params, minibatch, count):
        """Loss, metrics and gradients of a minibatch, summed over its microbatches."""

        def add(total, part):
            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, part, count)
            return jax.tree.map(jnp.add, total, grads), (loss, metrics)

        if update.microbatches == 1:
            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, minibatch, count)
            return loss, metrics, grads
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, (losses, metrics) = jax.lax.scan(add, zeros, _split(minibatch, update.microbatches))
        return losses.sum(), metrics_lib.merge(metrics), grads

    def optimizer_step(params, opt_state, minibatch):
        b, old, ref = minibatch
        weights = objective.token_weights(b.mask)
        # Each data shard sums over its own microbatches; then one reduction over data, and not one a microbatch.
        count = most_tokens(b.mask, update.microbatches)
        loss, metrics, grads = over_data(gradients, params, (b, old, ref, weights), count)
        loss, metrics, grads = loss.sum(), metrics_lib.merge(metrics), jax.tree.map(lambda x: x.sum(0), grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        once = lambda x: metrics_lib.Mean(total=x, count=jnp.ones(()))
        metrics = {**metrics, "loss": once(loss), "grad_norm": once(optax.tree.norm(grads))}
        return optax.apply_updates(params, updates), opt_state, metrics

    def train_step(state: TrainState, batch: TrainBatch):
        check_divides(batch.mask.shape[0], update, mesh)
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, rows))
        ref = frozen_logprobs(state.reference, batch) if objective.needs_reference else None
        # With a single update the old policy is the one that is differentiated: no pass is spent on it.
        old = frozen_logprobs(state.params, batch) if optimizer_steps > 1 else None

        def one(carry, order):
            params, opt_state = carry
            minibatch = (
                jax.tree.map(lambda x: x[order], (batch, old, ref)) if update.minibatches > 1 else (batch, old, ref)
            )
            params, opt_state, metrics = optimizer_step(params, opt_state, minibatch)
            return (params, opt_state), metrics

        orders = _orders(jax.random.fold_in(key, state.step), batch.mask.shape[0], update)
        (params, opt_state), metrics = jax.lax.scan(one, (state.params, state.opt_state), orders)
        metrics = metrics_lib.merge(metrics)
        if old is not None:
            metrics |= _mismatch(old, batch)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics_lib.finalize(metrics)

    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


def _mismatch(logprobs: jax.Array, batch: TrainBatch) -> dict[str, metrics_lib.Mean | metrics_lib.Max]:
    """How far the sampler's log-probabilities are from the trainer's, which should be the same numbers."""
    if batch.sampler_logprobs is None:
        return {}
    difference = jnp.abs(jax.lax.stop_gradient(logprobs) - batch.sampler_logprobs)
    name = "sampling/sampling_logp_difference"
    return {
        f"{name}/mean": metrics_lib.masked_mean(difference, batch.mask),
        f"{name}/max": metrics_lib.Max(top=jnp.where(batch.mask, difference, 0).max()),
    }


def _orders(key: jax.Array, completions: int, update: UpdateConfig) -> jax.Array:
    """[epochs * minibatches, b]: which completions make each minibatch; a new permutation every epoch."""
    permute = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), completions))
    return permute(jnp.arange(update.epochs)).reshape(update.epochs * update.minibatches, -1)


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
