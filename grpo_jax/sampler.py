"""The sampler as a run uses it: prompts in text, compiled for a mesh, cut to the memory there is."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from grpo_jax import hosts, prefill, sampling, sharding
from grpo_jax.compiling import Lowering
from grpo_jax.data.stops import stop_table
from grpo_jax.data.tokenizer import Tokenizer, pad
from grpo_jax.memory import least_memory, most_alive
from grpo_jax.slots import arrange
from grpo_jax.types import Policy, PyTree, Rollout, SamplingParams

__all__ = ["Plan", "Sampler", "check_stop", "join", "rollout_bytes"]

# A CPU's products of more rows are hardly faster a row, while slots that wait for the longest cost as much as others,
# and wait the longer the longer completions may be: so many columns of cache, and no fewer slots than these.
_CPU_COLUMNS, _CPU_SLOTS = 2**13, 16
# XLA makes one product of those that read the same. At a token of 256 slots that gains for query, key and value, and
# loses for the MLP's larger matrices: 45 us on an H200 for [1536, 2 x 8960], and 32 for the two. And kernels of a token
# are so small that those run beside each other which do not need each other.
_COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 8, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
}


def check_stop(stop: Sequence[str]) -> None:
    """Raises ValueError unless these are stop strings: a string alone would be taken for its characters."""
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(
            f"stop={stop!r} must be a tuple of strings, none of them empty: ('Question:',), which as a flag is "
            "--rollout.stop=\"('Question:',)\"."
        )


def _ends(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[list[int], list[str]]:
    """The ids that end a completion, and the strings that do: a stop string may be a special token, which is an id."""
    ids, strings = list(tokenizer.eos_ids), []
    for string in stop:
        tokens = tokenizer.encode(string, continues=True)
        silent = [i for i in tokens if tokenizer.token_bytes[i] is None]
        if silent and len(tokens) > 1:
            raise ValueError(f"stop string {string!r} holds a special token beside other text: give one of them alone.")
        ids += silent
        strings += [] if silent else [string]
    return ids, strings


def rollout_bytes(
    policy: Policy, mesh: Mesh, params: PyTree, *, prompts: int, group_size: int, slots: int, max_prompt_tokens: int,
    max_tokens: int,
) -> int:  # fmt: skip
    """Bytes a device needs to sample, estimated from shapes: weights, caches, results, and what comes and goes.

    The last is that of the prefill, or of the choice of tokens, whichever is more.

    Args:
      params: of the trainer, or their shapes.
      slots: completions at a time, 0: all.
    """
    devices, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    rows, width = arrange(prompts, group_size, slots, devices)
    parts = prefill.chunks(policy, prompts, max_prompt_tokens, devices)
    columns, chunk = sum(count * of_chunk for count, of_chunk in parts), max(of_chunk for _, of_chunk in parts)
    weights = jax.eval_shape(policy.prepare, params)
    vocabulary = len(jax.eval_shape(policy.head, weights)[0])
    caches = lambda *shape: jax.eval_shape(lambda: policy.init_cache(*shape))

    def cache(*shape: int) -> int:
        tree = caches(*shape)
        return sharding.device_bytes(tree, policy.cache_axes, mesh, sharding.SAMPLER_RULES)

    refilled = (rows, width) != (prompts, group_size)
    ids = lambda columns: jax.ShapeDtypeStruct((prompts, 1, columns), jnp.int32)
    first = (params,) if policy.prefill else ()
    # As if there were one block: XLA computes the scores of several at the same time.
    extended = jax.make_jaxpr(policy.prefill or policy.extend)(
        *first, weights, ids(chunk), ids(chunk), caches(prompts, 1, columns), 0, ids(columns)
    )
    # Logits, and four times as much of what is made of them; of the first tokens those of all prompts.
    choice = 4 * 5 * max(rows * width, prompts) * vocabulary // (1 if vocabulary % tensor else tensor)
    return (
        sharding.device_bytes(weights, policy.sampler_axes, mesh, sharding.SAMPLER_RULES)
        + cache(prompts, 1, columns)
        + refilled * cache(rows, 1, columns)
        + cache(rows, width, max_tokens)
        + max(most_alive(extended.jaxpr), choice) // devices
        + 2 * 12 * prompts * group_size * max_tokens // devices  # token and two log-probabilities, twice
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a rollout is cut to the memory there is."""

    prompts: int  # at a time
    slots: int  # completions at a time, about; 0: all of those prompts


class Sampler:
    """`sampling.generate`, compiled for a mesh, in chunks of tokens so that the host has a turn between them."""

    def __init__(
        self, policy: Policy, mesh: Mesh, tokenizer: Tokenizer, *, group_size: int, max_tokens: int,
        max_prompt_tokens: int, key: jax.Array, stop: Sequence[str] = (), slots: int = 0, chunk: int = 64,
        memory: int | None = None, copies: float = 4,
    ):  # fmt: skip
        """`key` is the root of all randomness: with prompt id, member and token index it gives a token's.

        Args:
          stop: strings, special tokens among them, that end a completion as an EOS does.
          slots: completions decoded at a time, about; a slot whose completion has ended takes the next. 0: on a CPU
            8192 / max_tokens, or 16 where that is less; elsewhere all, or as many as fit, since an accelerator reads
            its weights at every token, which takes as long for few as for hundreds.
          chunk: tokens between two turns of the host.
          memory: bytes of a device; None: what it says. A rollout that does not fit beside `copies` is cut.
          copies: of the trainer's parameters that are held meanwhile: 4 with Adam's moments and a reference, 1 where
            nothing is trained, hardly more where adapters are.
        """
        if not tokenizer.eos_ids or tokenizer.pad_id is None:
            raise ValueError(
                f"the tokenizer has eos_ids={tokenizer.eos_ids!r} and pad_id={tokenizer.pad_id!r}: sampling needs at "
                "least one id that ends a completion, and one to pad with (an EOS id will do)."
            )
        check_stop(stop)
        if min(group_size, max_tokens, max_prompt_tokens, chunk) < 1 or slots < 0:
            raise ValueError(
                f"group_size={group_size}, max_tokens={max_tokens}, max_prompt_tokens={max_prompt_tokens} and "
                f"chunk={chunk} must be 1 or more, slots={slots} 0 or more."
            )
        self.tokenizer, self.group_size = tokenizer, group_size
        self.max_prompt_tokens, self.max_tokens = max_prompt_tokens, max_tokens
        self.mesh, self._policy, self._slots, self._chunk = mesh, policy, slots, chunk
        self._memory, self._copies = least_memory() if memory is None else memory, copies
        eos_ids, strings = _ends(tokenizer, stop)
        table = stop_table(tokenizer.token_bytes, strings) if strings else None
        self._fixed = key, np.asarray(eos_ids, np.int32), np.int32(tokenizer.pad_id), table
        self._plans: dict[int, Plan] = {}
        self._compiled: dict[Plan, tuple[Any, Any]] = {}
        self._collect = jax.jit(
            functools.partial(sampling.collect, mesh=mesh), out_shardings=sharding.batch_sharding(mesh)
        )

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt_tokens`.
        """
        rows = [self.tokenizer.encode(text) for text in prompts]
        for text, row in zip(prompts, rows, strict=True):
            if not 1 <= len(row) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompt {text!r} has {len(row)} tokens; expected from 1 to {self.max_prompt_tokens}. "
                    "Shorten it, leave it out, or raise the limit."
                )
        return rows

    def plan(self, params: PyTree, prompts: int) -> Plan:
        """How many prompts and completions at a time: all if they fit beside what is held, else fewer, which is said.

        A function of shapes and of the size of the memory, not of what is free at the moment, so that a run that is
        continued does the same.

        Raises:
          ValueError: the prompts do not divide over the mesh.
        """
        if prompts in self._plans:
            return self._plans[prompts]
        devices, group = self.mesh.shape["data"] * self.mesh.shape["fsdp"], self.group_size
        arrange(prompts, group, 0, devices)  # raises
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        wanted = self._slots or (max(_CPU_SLOTS, _CPU_COLUMNS // self.max_tokens) * devices if cpu else 0)
        wanted = wanted if wanted < prompts * group else 0
        sizes = {"max_prompt_tokens": self.max_prompt_tokens, "max_tokens": self.max_tokens, "group_size": group}

        @functools.cache
        def needs(plan: Plan) -> int:
            return rollout_bytes(self._policy, self.mesh, params, prompts=plan.prompts, slots=plan.slots, **sizes)

        held = self._copies * sharding.device_bytes(params, self._policy.param_axes, self.mesh)
        room = math.inf if self._memory is None else 0.9 * self._memory - held
        # Fewer slots first, down to an eighth, or as many as were asked for; then waves.
        plans = []
        for size in [prompts // n for n in range(1, prompts // devices + 1) if prompts // devices % n == 0]:
            every = min(wanted or size * group, size * group)
            for slots in [max(1, every // part) for part in ((1,) if self._slots else (1, 2, 4, 8))]:
                plans.append(Plan(prompts=size, slots=0 if slots == size * group else slots))
        fits = lambda plan: room == math.inf or needs(plan) <= room
        plan = next(filter(fits, plans), plans[-1])
        if plan != plans[0] or not fits(plan):
            gib = lambda n: f"{n / 2**30:.2f} GiB"
            hardly = "." if fits(plan) else f"; these need {gib(needs(plan))}, which will hardly fit either."
            logging.getLogger(__name__).warning(
                "rollout: %d x %d completions at a time need about %s a device, beside %s of parameters and optimizer "
                "state, and there are %s: sampled in %d waves of %d prompts, %s completions at a time%s",
                prompts, group, gib(needs(plans[0])), gib(held), gib(self._memory or 0), prompts // plan.prompts,
                plan.prompts, plan.slots or plan.prompts * group, hardly,
            )  # fmt: skip
        return self._plans.setdefault(prompts, plan)

    def __call__(
        self, params: PyTree, prompts: Sequence[str], prompt_ids: Sequence[int] | np.ndarray,
        sampling_params: SamplingParams, interrupt: Callable[[], None] = lambda: None,
        limits: np.ndarray | None = None,
    ) -> Rollout:  # fmt: skip
        """Samples a group for each prompt; `interrupt` is called between chunks and may raise.

        Args:
          prompts: texts; of several processes each asks for those alone whose rows its devices hold.
          limits: [P, G] int32, where completions are cut before `max_tokens`; 0: nothing is sampled. None: nowhere.

        Raises:
          ValueError: there are no prompts, or not as many ids; they do not divide over the mesh; one is empty or too
            long.
          HostError: another process could not read its prompts.
        """
        return join(list(self.waves(params, prompts, prompt_ids, sampling_params, interrupt, limits)))

    def waves(
        self, params: PyTree, prompts: Sequence[str], prompt_ids: Sequence[int] | np.ndarray,
        sampling_params: SamplingParams, interrupt: Callable[[], None] = lambda: None,
        limits: np.ndarray | None = None,
    ) -> Iterator[Rollout]:  # fmt: skip
        """What `__call__` samples, as it is cut to the memory: of some prompts at a time, in their order.

        A wave is sampled when it is asked for; `join` puts all together.
        """
        for prefilled, state, decode, *tokens_and_mask in self._begin(
            params, prompts, prompt_ids, sampling_params, limits
        ):
            while True:
                interrupt()
                if state.done():
                    break
                state = decode(prefilled, state, np.int32(self._chunk))
            wave = self._collect(prefilled, state, *tokens_and_mask)
            del prefilled, state  # before the next wave makes its own
            yield wave

    def stream(
        self, params: PyTree, prompts: Sequence[str], prompt_ids: Sequence[int] | np.ndarray,
        sampling_params: SamplingParams, every: int = 1,
    ) -> Iterator[list[list[str]]]:  # fmt: skip
        """The completions of each prompt as they come, for people to watch: `texts[p][g]`, as far as they have got.

        Args:
          every: tokens between two turns.

        Yields:
          The texts of all, every time, at last whole; prompts that are sampled later have empty ones.

        Raises:
          ValueError: as `__call__`.
        """
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more tokens.")
        texts = [[""] * self.group_size for _ in prompts]
        first = 0
        for prefilled, state, decode, tokens, mask in self._begin(params, prompts, prompt_ids, sampling_params, None):
            while True:
                so_far = hosts.fetched(self._collect(prefilled, state, tokens, mask))
                for b, (ids, keep) in enumerate(zip(so_far.completion_tokens, so_far.mask, strict=True)):
                    text = self.tokenizer.decode(ids[keep].tolist())
                    # A character whose bytes are not all there yet waits for the others.
                    done = so_far.finished[b] or keep.all()
                    texts[first + b // self.group_size][b % self.group_size] = text if done else text.rstrip("\ufffd")
                yield [list(row) for row in texts]
                if state.done():
                    break
                state = decode(prefilled, state, np.int32(every))
            del prefilled, state  # as above
            first += len(tokens)

    def compile(self, params: PyTree, prompts: int) -> tuple[Compiled, Compiled]:
        """Prefill and a chunk of decoding, compiled ahead: to see what they need, on devices that are not here too.

        Args:
          params: ShapeDtypeStructs with shardings.
          prompts: P, a multiple of data x fsdp.
        """
        start, decode, _ = self.lowerings(params, prompts)
        return start().compile(), decode().compile()

    def lowerings(self, params: PyTree, prompts: int) -> list[Lowering]:
        """All that a call runs: prefill, a chunk of decoding, and what puts the completions in order. As `compile`."""
        rows, plan = sharding.batch_sharding(self.mesh), self.plan(params, prompts)
        shape = lambda dtype, *columns: jax.ShapeDtypeStruct((plan.prompts, *columns), dtype, sharding=rows)
        of_prompts = [shape(dtype, self.max_prompt_tokens) for dtype in (np.int32, bool)]
        others = shape(np.uint32), shape(np.int32, self.group_size)
        arguments = params, SamplingParams(), *self._fixed, *of_prompts, *others
        start, decode = self._programs(plan, *arguments)
        prefilled, state = jax.eval_shape(start, *arguments)
        places = sampling.placement(self._policy, prefilled, state, self.mesh)
        abstract = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=x.weak_type)
        held = jax.tree.map(abstract, (prefilled, state), places)
        return [
            lambda: start.lower(*arguments),
            lambda: decode.lower(*held, np.int32(self._chunk)),
            lambda: self._collect.lower(*held, *of_prompts),
        ]

    def abstract_rollout(self, prompts: int) -> Rollout:
        """Shapes and places of what a call returns that samples so many prompts."""
        rows, group = sharding.batch_sharding(self.mesh), prompts * self.group_size
        shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=rows)
        of_prompts, of_tokens = (prompts, self.max_prompt_tokens), (group, self.max_tokens)
        return Rollout(
            prompt_tokens=shape(np.int32, *of_prompts), prompt_mask=shape(bool, *of_prompts),
            completion_tokens=shape(np.int32, *of_tokens), mask=shape(bool, *of_tokens), finished=shape(bool, group),
            logprobs=shape(np.float32, *of_tokens), sampler_logprobs=shape(np.float32, *of_tokens),
        )  # fmt: skip

    def _programs(self, plan: Plan, *arguments: Any) -> tuple[Any, Any]:
        """`start` and `decode`, jitted; what they return lies where they take it, and nothing is compiled twice."""
        if plan not in self._compiled:

            def start(params, sampling_params, key, eos_ids, pad_id, stop_table, tokens, mask, ids, limits):
                return sampling.start(
                    self._policy, params, tokens, mask, ids, key, group_size=self.group_size,
                    max_tokens=self.max_tokens, eos_ids=eos_ids, pad_id=pad_id, sampling=sampling_params,
                    stop_table=stop_table, limits=limits, slots=plan.slots, mesh=self.mesh,
                )  # fmt: skip

            prefilled, state = jax.eval_shape(start, *arguments)
            places = sampling.placement(self._policy, prefilled, state, self.mesh)
            decode = functools.partial(sampling.decode, self._policy, mesh=self.mesh)
            options = _COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform)
            self._compiled[plan] = (
                jax.jit(start, out_shardings=places),
                jax.jit(decode, out_shardings=places[1], donate_argnums=1, compiler_options=options),
            )
        return self._compiled[plan]

    def _encoded(self, prompts: Sequence[str], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """[P, max_prompt_tokens] int32 and bool, in which each process has the rows that its devices will hold."""
        held = hosts.held(plan.prompts, sharding.batch_sharding(self.mesh))
        rows = [first + row for first in range(0, len(prompts), plan.prompts) for row in held]
        encoded: list[list[int]] = [[]] * len(prompts)
        encode = lambda: self.encode([prompts[row] for row in rows])
        own = hosts.together(encode, also=(ValueError, OSError), waits_for="had read their prompts")
        for row, ids in zip(rows, own, strict=True):
            encoded[row] = ids
        return pad(encoded, self.max_prompt_tokens)

    def _begin(self, params, prompts, prompt_ids, sampling_params, limits) -> Iterator[tuple[Any, ...]]:
        """For as many prompts as are sampled at a time: prefilled, state, decode, their tokens and mask."""
        if not len(prompts) or len(prompt_ids) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts with {len(prompt_ids)} ids: expected one or more, each with its id."
            )
        plan = self.plan(params, len(prompts))
        tokens, mask = self._encoded(prompts, plan)
        shape = len(prompts), self.group_size
        limits = np.full(shape, self.max_tokens) if limits is None else np.asarray(limits)
        if limits.shape != shape:
            raise ValueError(f"limits of shape {limits.shape} must be of shape {shape}: a number for each completion.")
        if limits.min() < 0:
            raise ValueError(f"limits are numbers of tokens, 0 or more, and one is {limits.min()}.")
        of_prompts = tokens, mask, np.asarray(prompt_ids, np.uint32), limits.astype(np.int32)
        for first in range(0, len(prompts), plan.prompts):
            part = tuple(x[first : first + plan.prompts] for x in of_prompts)
            part = hosts.put(part, sharding.batch_sharding(self.mesh))
            arguments = params, sampling_params, *self._fixed, *part
            start, decode = self._programs(plan, *arguments)
            yield *start(*arguments), decode, *part[:2]


def join(waves: Sequence[Rollout]) -> Rollout:
    """One rollout of several, in order."""
    return waves[0] if len(waves) == 1 else _join(waves)


@jax.jit
def _join(waves: Sequence[Rollout]) -> Rollout:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *waves)
