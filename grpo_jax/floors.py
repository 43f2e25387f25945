"""What a GRPO step has to compute, to read and to send at least, by formulas: FLOP, bytes of memory, bytes over links.

Plain numbers in, plain numbers out: of a decoder's sizes, the lengths of prompts and completions, and a mesh. `Work` is
that of one device and one step; divided by what a chip does in a second it is a floor of the time, and the largest of
the three floors names what will limit the step.

    P_layer = D C (2 H + 2 K) + 3 D M                 parameters of a layer's matrices (M: hidden units of the MLP)
    seen(p) = min(p + 1, window)                      columns that a token at position p attends to
    a product with a matrix: 2 FLOP a parameter and token; a token's attention in a layer: 4 H C seen(p)
    all-gather, reduce-scatter of S bytes over n      S (n - 1) / n a device; an all-reduce is both (rings)

With adapters (LoRA) a layer has r (inputs + outputs) more of each matrix that has one, and only these train: of what
is frozen a backward pass has no gradient, 4 FLOP a parameter and token in all and not 6, and nothing to reduce.

A device's share: rows are split over data x fsdp, a layer's matrices and the vocabulary over tensor (keys and values
too, where it divides their heads). Not counted are norms, biases, rotary positions, the choice of tokens, the FLOP of
the optimizer, adding adapters to their matrices for the sampler, and what has a number or a few a token: floors are
not to be reached, they are to rule out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = [
    "Adapters",
    "Layout",
    "Model",
    "Rates",
    "Step",
    "Work",
    "decode",
    "kept",
    "of_step",
    "prefill",
    "reference",
    "seen",
    "update",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a decoder, named as in `TransformerConfig`."""

    vocab_size: int  # V
    layers: int  # N
    width: int  # D
    heads: int  # H
    kv_heads: int  # K
    head_width: int  # C
    mlp_width: int  # M
    tied: bool = True  # the unembedding is the embedding
    windows: tuple[int, ...] = (0,)  # tokens that a layer's see; repeats over the layers; 0: all
    qk_norm: bool = False  # queries and keys go through a norm
    post_norms: bool = False  # what attention and MLP add goes through one

    @classmethod
    def of(cls, config: Any) -> "Model":
        """The sizes of what has them by these names, as a `TransformerConfig`."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of a layer: inputs and outputs of each, one of which is the width."""
        query, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "query": (self.width, query), "key": (self.width, keys), "value": (self.width, keys),
            "output": (query, self.width), "gate": (self.width, self.mlp_width), "up": (self.width, self.mlp_width),
            "down": (self.mlp_width, self.width),
        }  # fmt: skip

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def body(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * self.layer

    @property
    def head(self) -> int:
        """Parameters of the unembedding."""
        return self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """Of all matrices and the embedding."""
        return self.body + self.head * (1 if self.tied else 2)

    @property
    def every_window(self) -> list[int]:
        """The window of each layer."""
        return [self.windows[i % len(self.windows)] for i in range(self.layers)]

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the caches of a layer."""
        return 2 * self.kv_heads * self.head_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices along each axis, as in `sharding.MeshConfig`."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1  # parts of data, between which a data-centre network carries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """What alone trains, as in `LoraConfig`."""

    rank: int  # r
    targets: tuple[str, ...]  # names of `Model.matrices`
    base_bytes: int = 4  # of a number in what is frozen

    def sides(self, model: Model, layout: Layout) -> tuple[float, float]:
        """A device's parameters in all layers: on the side of the width, split over fsdp, and others, over tensor."""
        others = sum(sum(model.matrices[name]) - model.width for name in self.targets)
        ranks = model.layers * self.rank
        return ranks * len(self.targets) * model.width / layout.fsdp, ranks * others / layout.tensor

    def parameters(self, model: Model) -> float:
        """In all layers."""
        return sum(self.sides(model, Layout()))

    def sums(self, remat: str, *, backward: bool) -> int:
        """How often a pass adds up r numbers of a token over tensor, inside of a layer's adapters."""
        summed = {*self.targets} & {"output", "down"}  # whose inputs are split over it; of others, outputs
        again = () if remat == "dots" else summed  # see `kept`
        return len(summed) + (len({*self.targets} - summed) + len(again) if backward else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step's lengths, and how it is cut."""

    prompt_tokens: int  # L, of every prompt
    lengths: np.ndarray  # [P, G] int, tokens of each completion, 1 or more
    max_tokens: int  # T, columns of a row are L + T
    slots: int = 0  # completions decoded at a time on all devices; 0: all
    chunks: int = 1  # of columns, in which prompts are prefilled
    waves: int = 1  # parts of the prompts that are sampled one after the other
    epochs: int = 1  # passes over the completions
    minibatches: int = 1  # optimizer steps a pass
    microbatches: int = 1  # parts of a minibatch
    reference: bool = True  # a pass of a frozen model
    remat: str = "full"  # what of a layer is computed again in the backward pass: none, dots or full
    adapters: Adapters | None = None  # None: all parameters train
    compute_bytes: int = 2  # of a number in activations and products
    sampler_bytes: float = 2  # of a number in the sampler's weights
    cache_bytes: int = 2  # of a number in the sampler's caches

    def __post_init__(self) -> None:
        # Of 32 bits, as arrays of JAX are, their products with sizes of a model would overflow.
        object.__setattr__(self, "lengths", np.asarray(self.lengths).astype(np.int64, casting="safe"))

    @property
    def columns(self) -> np.ndarray:
        """[P, G]: tokens of a prompt with its completion."""
        return self.prompt_tokens + self.lengths

    @property
    def base_bytes(self) -> int:
        """Of a number in the parameters; adapters, and all where there are none, are float32."""
        return self.adapters.base_bytes if self.adapters else 4

    @property
    def parts(self) -> float:
        """Microbatches of one pass that hold something, where short completions share rows."""
        every = self.minibatches * self.microbatches
        return np.ceil(every * self.columns.mean() / (self.prompt_tokens + self.max_tokens))


def kept(model: Model, remat: str, adapters: Adapters | None = None, tensor: int = 1) -> float:
    """Numbers that a token leaves on a device in a layer, for the backward pass, by `transformer.REMAT`.

    full: the layer's input. dots: and what products with weights make, but for the last, which goes into the next
    layer's input, where no norm is behind it; where a matrix has an adapter what both make, and what is inside of it.
    none: each sum of both, what attention makes, and what goes into norms; what is elementwise is made again, and what
    is inside of adapters.
    """
    if remat == "full":
        return model.width
    outputs = {name: size for name, (_, size) in model.matrices.items() if name != "down" or model.post_norms}
    made = {name: size if name in ("output", "down") else size / tensor for name, size in outputs.items()}
    if remat == "dots":
        own = adapters or Adapters(rank=0, targets=())
        more = own.rank * len(own.targets) + sum(made.get(name, 0) for name in own.targets)
    else:
        more = made["query"] + model.qk_norm * (made["query"] + made["key"]) + model.post_norms * model.width
    return model.width + sum(made.values()) + more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a chip does in a second, as its maker says."""

    flop: float  # in bfloat16
    memory: float  # bytes read or written
    interconnect: float  # bytes sent, over all links together
    network: float = 0.0  # bytes sent from slice to slice, a chip's share of its host's; 0: not said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Of one device."""

    flop: float
    memory: Mapping[str, float]  # bytes read and written, by what for
    interconnect: Mapping[str, float]  # bytes sent, by what for
    network: Mapping[str, float] = dataclasses.field(default_factory=dict)  # bytes sent from slice to slice

    def milliseconds(self, rates: Rates) -> dict[str, float]:
        """The three floors; and where something goes from slice to slice, a fourth."""
        floors = {
            "compute": 1e3 * self.flop / rates.flop,
            "memory": 1e3 * sum(self.memory.values()) / rates.memory,
            "interconnect": 1e3 * sum(self.interconnect.values()) / rates.interconnect,
        }
        return floors | ({"network": 1e3 * sum(self.network.values()) / rates.network} if self.network else {})

    def bottleneck(self, rates: Rates) -> str:
        """The largest of the floors."""
        floors = self.milliseconds(rates)
        return max(floors, key=lambda name: floors[name])


def seen(first: np.ndarray | int, last: np.ndarray | int, window: int = 0) -> np.ndarray:
    r"""Columns that the tokens at positions first, ..., last - 1 attend to, together.

    .. math:: \sum_{p=first}^{last-1} \min(p + 1, window)
    """

    def until(end: np.ndarray | int) -> np.ndarray:  # positions 0, ..., end - 1
        end = np.asarray(end, np.float64)
        ramp = np.minimum(end, window) if window else end
        return ramp * (ramp + 1) / 2 + (end - ramp) * window

    return until(last) - until(first)


def _gathered(size: float, parts: int) -> float:
    """Bytes that a device sends of an all-gather or a reduce-scatter of `size` bytes."""
    return size * (parts - 1) / parts


def _scores(model: Model, first: np.ndarray | int, last: np.ndarray | int) -> float:
    """FLOP of attention in all layers: a query on a key, and its value."""
    each = 4.0 * model.heads * model.head_width
    return each * sum(float(np.sum(seen(first, last, window))) for window in model.every_window)


def _embedded(model: Model, step: Step, layout: Layout, tokens: float) -> float:
    """Bytes of one sum over tensor, of so many tokens of a device: each looks ids up in its part of the table."""
    return 2 * _gathered(tokens * model.width * step.compute_bytes, layout.tensor)


def _over_tensor(model: Model, step: Step, layout: Layout, tokens: float, sums: int) -> float:
    """Bytes of so many sums of activations a layer over tensor, each as large as that of embeddings."""
    return model.layers * sums * _embedded(model, step, layout, tokens)


def prefill(model: Model, step: Step, layout: Layout = Layout()) -> Work:
    """The sampler's weights out of the trainer's, and every prompt once.

    Matrices lie split over fsdp and are gathered over it, in the sampler's precision: once for decoding, and layer by
    layer for each chunk of columns.
    """
    prompts, shards = len(step.lengths), layout.data * layout.fsdp
    tokens, whole = prompts * step.prompt_tokens, model.parameters / layout.tensor
    flop = 2.0 * (model.body * tokens + model.head * prompts) + prompts * _scores(model, 0, step.prompt_tokens)
    runs, body = step.waves * step.chunks, model.body / layout.tensor
    return Work(
        flop=flop / (shards * layout.tensor),
        memory={
            "weights": step.waves * (step.base_bytes * whole / layout.fsdp + step.sampler_bytes * whole)
            + runs * step.sampler_bytes * body,
            "caches": float(step.cache_bytes * model.layers * model.cached * tokens / (shards * _split(model, layout))),
        },
        interconnect={
            "weights over fsdp": _gathered(step.sampler_bytes * (step.waves * whole + runs * body), layout.fsdp),
            "embeddings over tensor": _embedded(model, step, layout, tokens / shards),
            "activations over tensor": _over_tensor(model, step, layout, tokens / shards, 2),
        },
    )


def _split(model: Model, layout: Layout) -> int:
    """Over how many devices of tensor the heads of caches are split."""
    return 1 if model.kv_heads % layout.tensor else layout.tensor


def decode(model: Model, step: Step, layout: Layout = Layout(), weight_bytes: float | None = None) -> Work:
    """All tokens but the first of each completion: at each the weights, and live caches, a prompt's once for its group.

    Args:
      model, step, layout: what is decoded, and where.
      weight_bytes: of all of the sampler's parameters; None: of those that are counted here.
    """
    later, shards = step.lengths - 1, layout.data * layout.fsdp
    rounds = max(later.max() * step.waves, later.sum() / (step.slots or later.size / step.waves))
    age = np.arange(1, max(int(later.max()), 1) + 1)  # of a completion at each of its tokens
    alive = (later[..., None] >= age).sum(axis=(0, 1))  # completions that have come so far
    groups = (later.max(axis=1)[:, None] >= age).sum(axis=0)
    own = prompts = 0.0
    for window in model.every_window:
        most = age if not window else np.minimum(age, window)
        of_prompt = step.prompt_tokens if not window else np.clip(window - age, 0, step.prompt_tokens)
        own, prompts = own + (alive * most).sum(), prompts + (groups * of_prompt).sum()
    flop = 2.0 * (model.body + model.head) * later.sum() + _scores(
        model, step.prompt_tokens, step.prompt_tokens + later
    )
    weights = step.sampler_bytes * (model.body + model.head) if weight_bytes is None else weight_bytes
    return Work(
        flop=float(flop) / (shards * layout.tensor),
        memory={
            "weights": float(rounds * weights / layout.tensor),
            "caches": float(step.cache_bytes * model.cached * (own + prompts) / (shards * _split(model, layout))),
        },
        interconnect={
            "embeddings over tensor": _embedded(model, step, layout, float(later.sum()) / shards),
            "activations over tensor": _over_tensor(model, step, layout, float(later.sum()) / shards, 2),
        },
    )


def _passed(model: Model, step: Step, layout: Layout, *, backward: bool, adapted: bool = True) -> dict[str, float]:
    """What is sent in one pass over all completions: of logarithms of probabilities, or of their gradients too."""
    own = step.adapters if adapted else None
    w, tensor, fsdp = step.compute_bytes, layout.tensor, layout.fsdp
    columns, lengths = (float(x.sum()) / (layout.data * fsdp) for x in (step.columns, step.lengths))
    states = lambda width: lengths * model.width * width  # of a device's completion tokens, which come to the head
    looked_up = columns * model.width * w
    again, whole = step.remat == "full", step.adapters is None
    sums = 2 + (2 + again if backward else 0)  # of what heads and hidden units add; what is kept needs no second sum
    # The table lies split along the width, and the head takes it split by ids; its gradient goes the way back.
    table = _gathered(float(step.base_bytes) * model.head / (tensor * fsdp), fsdp)
    of_table = 1 + (step.parts + step.minibatches if backward and whole else 0)
    sent = {
        "weights over fsdp": step.parts * _gathered(model.body / tensor * w * (1 + backward), fsdp),
        "embeddings over fsdp": _gathered(looked_up, fsdp) * (1 + (backward and whole)),
        "embeddings over tensor": _embedded(model, step, layout, columns),
        "activations over tensor": _over_tensor(model, step, layout, columns, sums),
        "table over fsdp": table * of_table,
        "tokens over fsdp": _gathered(states(w) * fsdp, fsdp),  # to the head
        "softmax over fsdp x tensor": 2
        * _gathered(4 * 4 * lengths * fsdp, fsdp * tensor),  # its maximum and three sums
    }
    of_width, others = own.sides(model, Layout(tensor=tensor)) if own else (0.0, 0.0)
    if own:
        inside = own.sums(step.remat, backward=backward) * 2 * _gathered(columns * own.rank * w, tensor)
        sent["activations over tensor"] += model.layers * inside
        sent["weights over fsdp"] += step.parts * _gathered(of_width * w * (1 + backward), fsdp)
    if backward:
        # As products make them: split where the parameters are, else summed.
        split = model.body / tensor if whole else of_width
        sent["gradients over fsdp"] = step.parts * (_gathered(split * w, fsdp) + 2 * _gathered(others * w, fsdp))
        sent["tokens over fsdp"] += _gathered(states(4) * fsdp, fsdp)
        sent["tokens over tensor"] = 2 * _gathered(states(4), tensor)
    return sent


def _products(model: Model, step: Step, each: int, of_adapters: int) -> float:
    """FLOP of all completions' tokens: so many products with each matrix, and with those of adapters."""
    columns, lengths = float(step.columns.sum()), float(step.lengths.sum())
    own = step.adapters.parameters(model) if step.adapters else 0.0
    return 2 * (each * (model.body * columns + model.head * lengths) + of_adapters * own * columns)


def _read(model: Model, step: Step, layout: Layout, adapted: bool = True) -> float:
    """Bytes of weights that a device reads in a pass over its part of all completions."""
    own = sum(step.adapters.sides(model, Layout(tensor=layout.tensor))) if step.adapters and adapted else 0.0
    return step.parts * step.compute_bytes * ((model.body + model.head / layout.fsdp) / layout.tensor + own)


def reference(model: Model, step: Step, layout: Layout = Layout(), *, adapted: bool = False) -> Work:
    """The pass of a frozen model over all completions with their prompts; `adapted`: with its adapters, if any."""
    flop = _products(model, step, 1, int(adapted)) + _scores(model, 0, step.columns)
    return Work(
        flop=flop / (layout.data * layout.fsdp * layout.tensor),
        memory={"weights": _read(model, step, layout, adapted)},
        interconnect=_passed(model, step, layout, backward=False, adapted=adapted),
    )


def update(model: Model, step: Step, layout: Layout = Layout()) -> Work:
    """Forward and backward pass over all completions, and Adam; what is computed twice does not count as FLOP.

    A product with a matrix is one forward, and backward one for the gradient of what went in and, if it trains, one for
    its own. Of memory: weights at each pass over them (forward, again where all is computed again, backward), gradients
    that are added up, what Adam reads and writes (of what trains the parameters, two moments, the gradient), and what
    layers keep for the backward pass (`kept`), written once and read once.
    """
    shards, e, a = layout.data * layout.fsdp, step.epochs, step.adapters
    trained = sum(a.sides(model, layout)) if a else model.parameters / (layout.fsdp * layout.tensor)
    own = 4.0 * trained  # bytes of a device's parameters, which are float32
    flop = _products(model, step, 2 if a else 3, 3) + 3 * _scores(model, 0, step.columns)
    of_token = model.layers * kept(model, step.remat, a, layout.tensor) * step.compute_bytes
    sent = {name: e * size for name, size in _passed(model, step, layout, backward=True).items()}
    # Within a slice each device gets a part of the sum, which goes over the slices, and back within them.
    within, sums = layout.data // layout.slices, e * step.minibatches * 2
    sent["gradients over data"] = sums * _gathered(own, within)
    slow = {"gradients over slices": sums * _gathered(own / within, layout.slices)} if layout.slices > 1 else {}
    return Work(
        flop=e * flop / (shards * layout.tensor),
        memory={
            "weights": float(e * (2 + (step.remat == "full")) * _read(model, step, layout)),
            "gradients": float(e * step.parts * 2 * own),
            "optimizer": e * step.minibatches * 7 * own,
            "activations": float(e * 2 * step.columns.sum() / shards * of_token),
        },
        interconnect=sent,
        network=slow,
    )


def of_step(model: Model, step: Step, layout: Layout = Layout()) -> dict[str, Work]:
    """The parts of a step, in their order.

    Returns:
      prefill, decode, reference where there is one, old (the pass under the parameters before, where there are several
      optimizer steps), and update.
    """
    parts = {"prefill": prefill(model, step, layout), "decode": decode(model, step, layout)}
    if step.reference:
        parts["reference"] = reference(model, step, layout)
    if step.epochs * step.minibatches > 1:
        parts["old"] = reference(model, step, layout, adapted=True)
    return {**parts, "update": update(model, step, layout)}
