"""Log-probabilities and entropies of tokens from hidden states.

Only the tokens that are asked for are unembedded, in chunks: losses see [B, T], and nothing ever holds [B, T, V].
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grpo_jax.packing import Rows, pack, take_columns
from grpo_jax.types import Policy

__all__ = ["CHUNK", "completion_logprobs", "row_logprobs", "token_logprobs", "unembed"]

Head = tuple[jax.Array, jax.Array | None, float | None]

CHUNK = 2**25  # logits, 128 MiB of them
_IDS = 4096  # of the vocabulary at a time: a slice of the matrix is read once for as many tokens as fit


def unembed(hidden: jax.Array, head: Head) -> jax.Array:
    """Logits in float32: hidden [..., D] and a head (kernel [V, D], bias [V], soft cap) -> [..., V]."""
    kernel, bias, soft_cap = head
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def token_logprobs(
    hidden: jax.Array,
    head: Head,
    tokens: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    mask: jax.Array | None = None,
    count: jax.Array | None = None,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Log-probabilities of tokens, and entropies of the distributions they were drawn from.

    .. math:: \log\pi(o) = z_o - \mathrm{lse}(z),\quad H = \mathrm{lse}(z) - \sum_v \pi_v z_v,\qquad
       \frac{\partial \log\pi(o)}{\partial z_v} = [v = o] - \pi_v,\quad
       \frac{\partial H}{\partial z_v} = -\pi_v (\log\pi_v + H)

    With :math:`z = ` logits / temperature. Where one chunk holds all logits, and fsdp does not split the matrix, they
    are computed plainly. Else a loop over chunks of them keeps running sums (the online softmax of arXiv 1805.02867),
    and the gradient computes them again: one more product, for memory that depends neither on the number of tokens nor
    on V. Over a mesh every device holds a part of the vocabulary, also along fsdp, where tokens come to the matrix, a
    chunk at a time, and not the matrix to the tokens.

    Args:
      hidden: [R, ..., D], the state before each token.
      head: kernel [V, D], bias [V] or None, soft cap or None.
      tokens: [R, ...] int32.
      temperature: of the softmax, broadcast against tokens, without a gradient; 0 (greedy sampling) stands for 1, as in
        `sampling`.
      mask: [R, ...] bool, the tokens that are asked for; both values are 0 elsewhere, and cost nothing where there are
        chunks. None: all.
      count: [] int32, no device is asked for more tokens; needed under `vmap`, where loops must not differ. None: the
        most that the mask asks of one.
      chunk: logits; what is held at a time, gradients and copies included, stays below two of these (where D is
        thousands wide, slices of the matrix come on top).
      mesh: over which R (axis fsdp) and V (fsdp and tensor) are split; None: nothing is.

    Returns:
      logprobs [R, ...] float32 and entropies [R, ...] float32, in nats. Both have gradients; stop those of entropies
      where nothing learns from them, and they cost nothing.
    """
    chex.assert_equal_shape([hidden[..., 0], tokens])
    chex.assert_equal_shape_suffix([hidden, head[0]], 1)
    temperature = jnp.where(temperature > 0, temperature, 1.0).astype(jnp.float32)
    temperature = jax.lax.stop_gradient(jnp.broadcast_to(temperature, tokens.shape))
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    # A sum over one device is none, but libtpu may stumble at it.
    mesh = None if mesh is None or mesh.size == 1 else mesh
    shards, parts = (1, 1) if mesh is None else (mesh.shape["fsdp"], mesh.shape["tensor"])
    # The plain version holds five times its logits, and XLA would gather a matrix that fsdp splits.
    if shards == 1 and tokens.size * head[0].shape[0] <= chunk // 4 * parts:
        return _plain(hidden, head, tokens, temperature, mask)
    if count is None:
        count = mask.reshape(shards, -1).sum(axis=1).max()
    kernel, bias, soft_cap = head
    spec = _Spec(soft_cap=soft_cap, chunk=chunk, mesh=mesh, vocab_axes=_vocab_axes(kernel.shape[0], mesh))
    return _chunked(spec, hidden, kernel, bias, count, (tokens, temperature, mask))


def _plain(hidden, head, tokens, temperature, mask):
    logits = unembed(hidden.reshape(tokens.size, -1), head) / temperature.reshape(-1, 1)
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # By comparison, for the gradient of an index is a scatter, a loop over tokens on the CPU.
    here = tokens.reshape(-1, 1) == jnp.arange(logits.shape[1])[None]
    of_token = jnp.where(here.any(axis=-1), jnp.where(here, logprobs, 0).sum(axis=-1), jnp.nan)
    finite = jnp.where(jnp.isfinite(logprobs), logprobs, 0)
    entropies = -(jnp.exp(logprobs) * finite).sum(axis=-1)
    asked = lambda x: jnp.where(mask, x.reshape(mask.shape), 0)
    return asked(of_token), asked(entropies)


# Chunks ---------------------------------------------------------------------------------------------


def _vocab_axes(ids: int, mesh: Mesh | None) -> tuple[str, ...]:
    """Axes over which the vocabulary is split: as many as divide it; along another, devices hold the same part."""
    if mesh is None:
        return ()
    choices = (("tensor", "fsdp"), ("tensor",), ("fsdp",), ())  # tensor first, as the matrix lies already
    return next(axes for axes in choices if ids % math.prod(mesh.shape[axis] for axis in axes) == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """What the loops over chunks need to know."""

    soft_cap: float | None
    chunk: int
    mesh: Mesh | None
    vocab_axes: tuple[str, ...]

    def on_devices(self, function, arguments, outputs):
        """`function(self, hidden, kernel, bias, count, *tokenwise)` of each device's tokens and part of the vocabulary.

        outputs: "t" for a result that goes by tokens, "v" by vocabulary.
        """
        function = functools.partial(function, self)
        if self.mesh is not None:
            by = {"t": P("fsdp"), "v": P(self.vocab_axes), "": P()}
            places = [by[x] for x in ["t", "v", "v", "", *"t" * (len(arguments) - 4)]]
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=tuple(places), out_specs=tuple(by[x] for x in outputs),
                check_vma=False,
            )  # fmt: skip
        return function(*arguments)

    @property
    def meet(self) -> bool:
        """Whether the tokens of all fsdp shards come together, because each shard has other parts of the vocabulary."""
        return "fsdp" in self.vocab_axes

    def first_id(self, ids: int) -> jax.Array | int:
        """Of this device's part, which has `ids`."""
        return jax.lax.axis_index(self.vocab_axes) * ids if self.vocab_axes else 0

    def there(self, targets: jax.Array, ids: int) -> jax.Array:
        """Which tokens are of the vocabulary, of which this device's part has `ids`."""
        parts = math.prod(self.mesh.shape[axis] for axis in self.vocab_axes) if self.mesh is not None else 1
        return (targets >= 0) & (targets < ids * parts)

    def together(self, x: jax.Array) -> jax.Array:
        """Tokens of a chunk, [t, ...] -> [fsdp x t, ...] where they meet."""
        return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) if self.meet else x

    def own(self, x: jax.Array) -> jax.Array:
        """What `together` joined of this device: [fsdp x t] -> [t]."""
        if not self.meet:
            return x
        own = x.shape[0] // jax.lax.axis_size("fsdp")
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * own, own)

    def over_vocabulary(self, reduce, x: jax.Array) -> jax.Array:
        """psum or pmax over the parts of the vocabulary."""
        return reduce(x, self.vocab_axes) if self.vocab_axes else x

    def tokens_of(self, mask: jax.Array, ids: int) -> tuple[int, jax.Array]:
        """How many tokens of this device come at a time, and their order: those first that are asked for.

        Behind the last stands an index that is none, so that nothing is written there.
        """
        shards = self.mesh.shape["fsdp"] if self.meet and self.mesh is not None else 1
        # Half a chunk of logits, for another half becomes their exponentials, or their gradient.
        size = min(max(1, self.chunk // 2 // (min(ids, _IDS) * shards)), mask.size)
        order = jnp.argsort(~mask, stable=True)
        order = jnp.where(jnp.arange(mask.size) < mask.sum(), order, mask.size)
        return size, jnp.pad(order, (0, -mask.size % size), constant_values=mask.size)

    def logits(self, hidden, part, bias, temperature):
        """[t, v], of tokens and a part of the kernel."""
        return unembed(hidden, (part, bias, self.soft_cap)) / temperature[:, None]


def _vocabulary(kernel: jax.Array, bias: jax.Array | None):
    """Chunks of this device's part of the vocabulary: their number, and chunk(j) -> (first, kernel, bias, new).

    All have one size, so that the last may begin before the one before it ends: `new` [1, v] says which ids it adds.
    A size of whole tiles (with 4,096 ids a chunk, 128), which products of accelerators are made of.
    """
    ids, tile = kernel.shape[0], max(1, _IDS // 32)
    size = -(-ids // -(-ids // _IDS))
    size = min(-(-size // tile) * tile, ids)
    count = -(-ids // size)

    def chunk(j):
        first = jnp.minimum(j * size, ids - size)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
        return first, cut(kernel), None if bias is None else cut(bias), (first + jnp.arange(size) >= j * size)[None]

    return count, chunk


def _raised(total, spread, top, higher):
    """Sums of w = exp(z - top) and of w (z - top), as sums of w' = exp(z - higher) and of w' (z - higher)."""
    scale = jnp.exp(top - higher)
    return total * scale, (spread + total * (top - higher)) * scale


def _forward(spec, hidden, kernel, bias, count, tokens, temperature, mask):
    """Log-probabilities, entropies and log-normalizers, each [n], of the tokens of one device."""
    shape, hidden = tokens.shape, hidden.reshape(-1, hidden.shape[-1])
    tokens, temperature = tokens.reshape(-1), temperature.reshape(-1)
    size, order = spec.tokens_of(mask.reshape(-1), kernel.shape[0])
    chunks, vocabulary = _vocabulary(kernel, bias)

    def of_tokens(i, out):
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        states, targets, temperatures = (spec.together(x[at]) for x in (hidden, tokens, temperature))
        known = spec.there(targets, kernel.shape[0])
        targets -= spec.first_id(kernel.shape[0])

        def add(j, sums):
            top, total, spread, chosen = sums
            first, part, part_bias, new = vocabulary(j)
            logits = jnp.where(new, spec.logits(states, part, part_bias, temperatures), -jnp.inf)
            higher = jnp.maximum(top, logits.max(axis=1))
            total, spread = _raised(total, spread, top, higher)
            logits -= higher[:, None]
            weights = jnp.exp(logits)
            here = (targets - first)[:, None] == jnp.arange(logits.shape[1])[None]
            found = (here & new).any(axis=1)
            return (
                higher, total + weights.sum(axis=1), spread + jnp.where(weights > 0, weights * logits, 0).sum(axis=1),
                jnp.where(found, jnp.where(here, logits, 0).sum(axis=1) + higher, chosen),
            )  # fmt: skip

        nothing = jnp.zeros(targets.shape)
        sums = nothing - 1e30, nothing, nothing, nothing
        top, total, spread, chosen = jax.lax.fori_loop(0, chunks, add, sums)
        highest = spec.over_vocabulary(jax.lax.pmax, top)
        total, spread = _raised(total, spread, top, highest)
        total, spread, chosen = (spec.over_vocabulary(jax.lax.psum, x) for x in (total, spread, chosen))
        normalizer = highest + jnp.log(total)
        chosen = jnp.where(known, chosen, jnp.nan)  # as where it is computed plainly
        values = (chosen - normalizer, jnp.log(total) - spread / total, normalizer)
        return tuple(x.at[at].set(spec.own(value), mode="drop") for x, value in zip(out, values, strict=True))

    zeros = jnp.zeros(tokens.shape)
    out = jax.lax.fori_loop(0, -(-count // size), of_tokens, (zeros, zeros, zeros))
    return tuple(x.reshape(shape) for x in out)


def _backward(
    learned, spec, hidden, kernel, bias, count, tokens, temperature, mask, normalizers, entropies, *cotangents
):
    """Gradients of hidden, kernel and bias on one device; computes the logits again. None of a frozen kernel."""
    shape, width = hidden.shape, hidden.shape[-1]
    hidden, tokens, temperature, normalizers, entropies, *cotangents = (
        x.reshape(-1, width) if x.ndim == hidden.ndim else x.reshape(-1)
        for x in (hidden, tokens, temperature, normalizers, entropies, *cotangents)
    )
    size, order = spec.tokens_of(mask.reshape(-1), kernel.shape[0])
    chunks, vocabulary = _vocabulary(kernel, bias)

    def of_tokens(i, grads):
        of_hidden, of_kernel, of_bias = grads
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        states, targets, temperatures, normalizer, entropy = (
            spec.together(x[at]) for x in (hidden, tokens, temperature, normalizers, entropies)
        )
        # Nothing is there behind the last token.
        weight, *of_entropy = (spec.together(x.at[at].get(mode="fill", fill_value=0)) for x in cotangents)
        targets -= spec.first_id(kernel.shape[0])

        def add(j, sums):
            of_states, of_kernel, of_bias = sums
            first, part, part_bias, new = vocabulary(j)
            logits = spec.logits(states, part, part_bias, temperatures)
            logprobs = logits - normalizer[:, None]
            probabilities = jnp.exp(logprobs)
            here = (targets - first)[:, None] == jnp.arange(logits.shape[1])[None]
            grad = jnp.where(here, weight[:, None], 0) - probabilities * weight[:, None]
            for of_one in of_entropy:
                seen = jnp.where(probabilities > 0, logprobs + entropy[:, None], 0)
                grad -= probabilities * seen * of_one[:, None]
            if spec.soft_cap is not None:
                grad *= 1 - jnp.square(logits * temperatures[:, None] / spec.soft_cap)
            grad = jnp.where(new, grad / temperatures[:, None], 0)
            low = grad.astype(states.dtype)
            of_states += jnp.matmul(low, part.astype(states.dtype), preferred_element_type=jnp.float32)
            if learned:
                of_part = jnp.matmul(low.T, states, preferred_element_type=jnp.float32)
                of_kernel = _added(of_kernel, of_part, first)
            return of_states, of_kernel, _added(of_bias, grad.sum(axis=0), first)

        nothing = jnp.zeros(states.shape, jnp.float32)
        of_states, of_kernel, of_bias = jax.lax.fori_loop(0, chunks, add, (nothing, of_kernel, of_bias))
        if spec.meet:
            of_states = jax.lax.psum_scatter(of_states, "fsdp", scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in spec.vocab_axes if axis != "fsdp")
        of_states = jax.lax.psum(of_states, others) if others else of_states
        return of_hidden.at[at].set(of_states.astype(hidden.dtype), mode="drop"), of_kernel, of_bias

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    of_kernel = zeros(kernel.shape) if learned else None
    start = (jnp.zeros_like(hidden), of_kernel, None if bias is None else zeros(bias.shape))
    of_hidden, *of_head = jax.lax.fori_loop(0, -(-count // size), of_tokens, start)
    if spec.mesh is not None and not spec.meet:  # tokens stayed apart: the one reduction of the matrix's gradient
        of_head = jax.lax.psum(of_head, "fsdp")
    of_kernel, of_bias = of_head
    of_kernel = jnp.asarray(of_kernel, kernel.dtype) if learned else None
    return of_hidden.reshape(shape), of_kernel, of_bias


def _added(whole: jax.Array | None, part: jax.Array, first: jax.Array) -> jax.Array | None:
    if whole is None:
        return None
    so_far = jax.lax.dynamic_slice_in_dim(whole, first, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(whole, so_far + part, first, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(spec, hidden, kernel, bias, count, tokenwise):
    return spec.on_devices(_forward, (hidden, kernel, bias, count, *tokenwise), "ttt")[:2]


def _chunked_fwd(spec, *primals):
    learned = () if primals[1].perturbed else None  # a sign: what is saved are arrays, and this has none
    hidden, kernel, bias, count, tokenwise = jax.tree.map(
        lambda x: x.value, primals, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    arguments = (hidden, kernel, bias, count, *tokenwise)
    logprobs, entropies, normalizers = spec.on_devices(_forward, arguments, "ttt")
    return (logprobs, entropies), (learned, (*arguments, normalizers, entropies))


def _chunked_bwd(spec, saved, cotangents):
    (learned, saved), (of_logprobs, of_entropies) = saved, cotangents
    if isinstance(of_logprobs, SymbolicZero):
        of_logprobs = jnp.zeros_like(saved[-1])
    learns = () if isinstance(of_entropies, SymbolicZero) else (of_entropies,)
    backward = functools.partial(_backward, learned is not None)
    grads = spec.on_devices(backward, (*saved, of_logprobs, *learns), "tvv")
    return (*grads, None, None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


# Completions ----------------------------------------------------------------------------------------


def row_logprobs(
    policy: Policy, params: Any, rows: Rows, *, count: jax.Array | None = None, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Log-probabilities of packed completions under `policy` with `params`.

    Args:
      policy: the model.
      params: its parameters.
      rows: R of them.
      count, mesh: as of `token_logprobs`.

    Returns:
      logprobs [R, T], entropies [R, T] of the rows' targets (float32; 0 where there is none), and the model's aux.
    """
    hidden, aux = policy.hidden(params, rows.tokens, rows.positions, rows.segments)
    states = take_columns(hidden, rows.predictors, mesh)
    head = policy.head(params)
    asked = {"mask": rows.mask, "count": count, "mesh": mesh}
    return *token_logprobs(states, head, rows.targets, rows.temperature, **asked), aux


def completion_logprobs(
    policy: Policy,
    params: Any,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    completion_tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Log-probabilities of completions given their prompts, under `policy` with `params`: one a row, on one device.

    Args:
      policy: the model.
      params: its parameters.
      prompt_tokens: [B, L] int32, padding on either side.
      prompt_mask: [B, L] bool.
      completion_tokens: [B, T] int32.
      mask: [B, T] bool, true on a prefix of each completion.
      temperature: [] or [B] float, of the softmax.

    Returns:
      logprobs [B, T], entropies [B, T] (float32; 0 where the mask is false), and the model's aux.
    """
    return row_logprobs(policy, params, pack(prompt_tokens, prompt_mask, completion_tokens, mask, temperature))
