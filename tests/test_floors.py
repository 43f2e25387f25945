"""Formulas of `floors` against loops in NumPy, token by token, and against what XLA's compiled programs send."""

import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.collectives import sent
from grpo_jax import floors, sharding
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models import lora
from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.optimizers import OptimizerConfig, make_optimizer
from grpo_jax.sampler import Sampler
from grpo_jax.training import UpdateConfig, abstract_train_state, make_train_step
from grpo_jax.types import TrainBatch

MODEL = floors.Model(
    vocab_size=50, layers=3, width=12, heads=4, kv_heads=2, head_width=6, mlp_width=20, tied=False, windows=(4, 0)
)
STEP = floors.Step(
    prompt_tokens=5, lengths=np.array([[1, 4, 7], [2, 2, 6]]), max_tokens=7, minibatches=2, microbatches=3,
    compute_bytes=2, sampler_bytes=1, cache_bytes=4,
)  # fmt: skip
WINDOWS = [4, 0, 4]  # of the three layers
HEAD = 50 * 12
SOME = floors.Adapters(rank=3, targets=("query", "output", "down"))
EVERY = floors.Adapters(rank=2, targets=tuple(MODEL.matrices))


def sees(position, window):
    """Columns that a token attends to, one by one."""
    return sum(1 for column in range(position + 1) if not window or position - column < window)


def attention(positions):
    """FLOP of queries on keys and of weights on values: 2 a number and column each, of all heads and layers."""
    return sum(2 * 2 * 4 * 6 * sees(p, window) for p in positions for window in WINDOWS)


@pytest.mark.parametrize("window", [0, 1, 4, 30])
def test_seen_is_a_sum_over_positions(window):
    for first, last in itertools.product((0, 3, 9), (9, 12)):
        assert floors.seen(first, last, window) == sum(sees(p, window) for p in range(first, last))


def test_a_model_counts_its_matrices():
    layer = 12 * 4 * 6 + 2 * 12 * 2 * 6 + 4 * 6 * 12 + 3 * 12 * 20
    assert (MODEL.layer, MODEL.body, MODEL.parameters) == (layer, 3 * layer, 3 * layer + 2 * HEAD)


def test_the_sampler_token_by_token():
    body = MODEL.body
    before = sum(2 * body for _ in range(2 * 5)) + 2 * (2 * HEAD + attention(range(5)))
    flop = read = 0
    weights = 1 * (body + HEAD)
    for t in range(1, 7):  # tokens after the first
        read += weights
        for group in STEP.lengths:
            alive = [n for n in group if n > t]
            for window in WINDOWS:
                columns = [c for c in range(5 + t) if not window or 5 + t - 1 - c < window]
                of_prompt = sum(c < 5 for c in columns)
                # A numbers of a key and a value; the prompt's are read once for all that are alive.
                read += 4 * 2 * 2 * 6 * (of_prompt * bool(alive) + (len(columns) - of_prompt) * len(alive))
            flop += sum(2 * (body + HEAD) + attention([5 + t - 1]) for _ in alive)
    prefill, decode = floors.prefill(MODEL, STEP), floors.decode(MODEL, STEP)
    assert prefill.flop == before
    assert prefill.memory["caches"] == 4 * 2 * 2 * 6 * 3 * 2 * 5
    assert decode.flop == flop
    assert sum(decode.memory.values()) == read
    assert not any({**prefill.interconnect, **decode.interconnect}.values())  # one device
    # With slots for two completions, weights are read as often as 16 tokens take two at a time; in two waves at least
    # as often as the longest completion has tokens, twice.
    read = lambda **changes: floors.decode(MODEL, dataclasses.replace(STEP, **changes)).memory["weights"] / weights
    assert (read(slots=2), read(waves=2), read(slots=2, waves=2), read(slots=1, waves=2)) == (8, 12, 12, 16)


def test_no_number_overflows():
    model = dataclasses.replace(MODEL, layers=80, width=8192, mlp_width=2**15, vocab_size=2**17)
    assert 2 * model.parameters > 2**31
    with pytest.raises(TypeError, match="Cannot cast"):
        dataclasses.replace(STEP, lengths=np.array([[1.5]]))
    lengths = np.full((4, 4), 2**12, np.int32)
    short, long = (dataclasses.replace(STEP, lengths=x, max_tokens=2**12) for x in (lengths, lengths.astype(np.int64)))
    found = floors.of_step(model, short, floors.Layout())
    assert found == floors.of_step(model, long, floors.Layout())
    assert all(size > 0 for work in found.values() for size in work.memory.values())


def test_a_pass_over_completions_token_by_token():
    tokens = flop = 0
    for n in STEP.lengths.reshape(-1):
        flop += sum(2 * MODEL.body for _ in range(5 + n)) + 2 * HEAD * n + attention(range(5 + n))
        tokens += n
    assert floors.reference(MODEL, STEP).flop == flop
    update = floors.update(MODEL, STEP)
    assert update.flop == 3 * flop
    # Six rows of 12 columns, 52 of 72 of which are filled, in 2 x 3 parts: five of them hold something.
    assert STEP.parts == 5
    parameters = MODEL.parameters
    assert update.memory == {
        "weights": 5 * 3 * 2 * (MODEL.body + HEAD), "gradients": 5 * 2 * 4 * parameters,
        "optimizer": 2 * 7 * 4 * parameters, "activations": 2 * 3 * 12 * 2 * (6 * 5 + tokens),
    }  # fmt: skip
    assert set(floors.of_step(MODEL, STEP)) == {"prefill", "decode", "reference", "old", "update"}
    # Of adapters alone there are gradients and moments; the policy's pass before is with them, the reference's without.
    own = 3 * 3 * ((12 + 24) + (24 + 12) + (20 + 12))
    parts = floors.of_step(MODEL, dataclasses.replace(STEP, adapters=SOME, remat="dots"))
    assert parts["reference"].flop == flop
    assert parts["old"].flop == flop + 2 * own * (6 * 5 + tokens)
    kept = 12 + (24 + 12 + 12 + 12 + 20 + 20) + 3 * 3 + 24 + 12  # query and output twice: of the matrix and its adapter
    assert parts["update"].memory == {
        "weights": 5 * 2 * 2 * (MODEL.body + HEAD + own), "gradients": 5 * 2 * 4 * own, "optimizer": 2 * 7 * 4 * own,
        "activations": 2 * 3 * kept * 2 * (6 * 5 + tokens),
    }  # fmt: skip


def test_a_mesh_divides_the_work():
    whole, layout = floors.of_step(MODEL, STEP), floors.Layout(data=2, fsdp=4, tensor=2)
    for name, part in floors.of_step(MODEL, STEP, layout).items():
        assert part.flop == whole[name].flop / 16
        assert 0 < sum(part.memory.values()) < sum(whole[name].memory.values())
    # Over slices: a device sums its part over the two of its slice, half of it over the slices, and gets the whole.
    parameters = 4 * MODEL.parameters / 2  # bytes of a device, two optimizer steps
    update = floors.update(MODEL, STEP, floors.Layout(data=4, fsdp=2, slices=2))
    assert update.interconnect["gradients over data"] == 2 * 2 * parameters / 2
    assert update.network == {"gradients over slices": 2 * 2 * (parameters / 2) / 2}
    assert not whole["update"].network
    slow = floors.Work(flop=50, memory={"a": 7}, interconnect={}, network={"b": 3})
    rates = floors.Rates(flop=1e3, memory=1e2, interconnect=1e1, network=1)
    assert slow.milliseconds(rates) == {"compute": 50, "memory": 70, "interconnect": 0, "network": 3000}
    work = floors.Work(flop=50, memory={"a": 3, "b": 4}, interconnect={"c": 0.8})
    assert work.milliseconds(rates) == {"compute": 50, "memory": 70, "interconnect": 80}
    assert work.bottleneck(rates) == "interconnect"


# What a program of ours does ----------------------------------------------------------------------------


def program(remat, adapters, model=MODEL, **options):
    """The loss of a row of 7 columns, as a function of what trains and of what is frozen, and shapes of both."""
    sizes = {f.name: getattr(model, f.name) for f in dataclasses.fields(floors.Model)} | {"windows": (0,)}
    config = TransformerConfig(**sizes, remat=remat, **options)
    own = lora.LoraConfig(rank=adapters.rank, targets=adapters.targets) if adapters else lora.LoraConfig()
    policy, ids = lora.adapted_policy(make_policy(config), config, own), jnp.ones((1, 7), jnp.int32)

    def loss(trained, frozen):
        params = policy.split.join(trained, frozen)
        return (policy.hidden(params, ids, ids, ids)[0][0] @ policy.head(params)[0].T).sum()

    return loss, *policy.split.parts(lora.abstract(config, own)[0])


def dots(jaxpr):
    """FLOP of the products of matrices in a program, and of those in attention, which have axes that are batches."""
    found = np.zeros(2)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batches, _) = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            found[int(bool(batches))] += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inside = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        found += times * sum((dots(value) for value in inside if hasattr(value, "eqns")), np.zeros(2))
    return found


@pytest.mark.parametrize("adapters", [None, SOME, EVERY])
def test_products_are_those_of_the_gradient(adapters):
    """All parameters train, or adapters alone; of attention all columns are computed here, not those before alone."""
    loss, trained, frozen = program("none", adapters)
    step = dataclasses.replace(STEP, prompt_tokens=0, lengths=np.array([[7]]), adapters=adapters)
    model = dataclasses.replace(MODEL, windows=(0,))
    scores = 4 * 4 * 6 * 3
    forward = floors.reference(model, step, adapted=True).flop - scores * 28
    assert dots(jax.make_jaxpr(loss)(trained, frozen).jaxpr).tolist() == [forward, scores * 49]
    # What is made again does not count: inside of adapters, see `Block`, and scores.
    inputs = [inputs for name, (inputs, _) in MODEL.matrices.items() if adapters and name in adapters.targets]
    again = 2 * 7 * 3 * adapters.rank * sum(inputs) if adapters else 0
    whole = floors.update(model, step).flop - 3 * scores * 28 + again
    assert dots(jax.make_jaxpr(jax.grad(loss))(trained, frozen).jaxpr).tolist() == [whole, 3.5 * scores * 49]


@pytest.mark.parametrize("norms", [{}, {"qk_norm": True}, {"post_norms": True}, {"qk_norm": True, "post_norms": True}])
@pytest.mark.parametrize("adapters", [None, SOME, EVERY])
def test_what_layers_keep_is_what_the_gradient_finds(adapters, norms):
    """Numbers of tokens, and of weights nothing but what they are: no other form of them."""
    model, found = dataclasses.replace(MODEL, **norms), {}
    for remat in ("full", "dots", "none"):
        loss, *params = program(remat, adapters, model, compute_dtype="bfloat16")
        kept = jax.tree.leaves(jax.eval_shape(lambda *x, loss=loss: jax.vjp(loss, *x)[1], *params))
        of_layers = [x for x in kept if x.shape and x.shape[0] == 3]
        found[remat] = sum(math.prod(x.shape) for x in of_layers if 7 in x.shape) / (3 * 7)
        given = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
        assert {(x.shape, x.dtype) for x in of_layers if 7 not in x.shape} <= given
    assert found == {remat: floors.kept(model, remat, adapters) for remat in found}


def test_what_layers_keep_is_split_over_tensor():
    step = dataclasses.replace(STEP, remat="dots")
    of_two, of_one = (floors.update(MODEL, step, floors.Layout(tensor=n)).memory["activations"] for n in (2, 1))
    assert of_two < of_one < 2 * of_two


# What is sent -----------------------------------------------------------------------------------------

PROMPT_TOKENS, MAX_TOKENS, COMPLETIONS = 32, 96, 64


def compiled_update(config, layout, microbatches, rank):
    """The text of a train step without a reference, for CPU devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor))
    own, objective = lora.LoraConfig(rank=rank), make_objective(LossConfig(kl_coef=0.0))
    policy = lora.adapted_policy(make_policy(config, mesh), config, own)
    optimizer, _ = make_optimizer(OptimizerConfig(), 100)
    state = abstract_train_state(policy, lora.abstract(config, own)[0], optimizer, objective, mesh)
    rows = sharding.batch_sharding(mesh)
    each = lambda dtype, *columns: jax.ShapeDtypeStruct((COMPLETIONS, *columns), dtype, sharding=rows)
    batch = TrainBatch(
        prompt_tokens=each(jnp.int32, PROMPT_TOKENS), prompt_mask=each(bool, PROMPT_TOKENS),
        completion_tokens=each(jnp.int32, MAX_TOKENS), mask=each(bool, MAX_TOKENS), advantages=each(jnp.float32),
        sampler_logprobs=each(jnp.float32, MAX_TOKENS), temperature=each(jnp.float32),
    )  # fmt: skip
    update = UpdateConfig(microbatches=microbatches)
    step = make_train_step(policy, optimizer, objective, update, like=state, key=jax.random.key(0))
    return step.lower(state, batch).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("layout", "microbatches", "remat", "rank"),
    [
        (floors.Layout(fsdp=4, tensor=2), 2, "full", 0),
        (floors.Layout(data=4, fsdp=2), 1, "full", 0),
        (floors.Layout(fsdp=4, tensor=2), 2, "dots", 2),
        (floors.Layout(data=4, fsdp=2), 1, "full", 2),
        (floors.Layout(data=2, fsdp=2, tensor=2), 1, "none", 0),
        (floors.Layout(data=4, fsdp=2), 1, "none", 2),
    ],
)
def test_what_an_update_sends_is_what_xla_sends(layout, microbatches, remat, rank):
    """By the axis over which it goes; up to what XLA does otherwise on CPUs, and a few numbers a token."""
    config = TransformerConfig(
        vocab_size=4096, layers=3, width=64, heads=4, kv_heads=2, head_width=16, mlp_width=192, remat=remat
    )
    model = floors.Model.of(config)
    step = floors.Step(
        prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS, lengths=np.full((COMPLETIONS // 8, 8), MAX_TOKENS),
        microbatches=microbatches, compute_bytes=4, remat=remat,
        adapters=floors.Adapters(rank=rank, targets=tuple(model.matrices)) if rank else None,
    )  # fmt: skip
    expected = floors.update(model, step, layout).interconnect
    # On CPUs a reduce-scatter of gradients is an all-reduce; and in the backward pass the gradients of what goes into
    # query, key and value, and into gate and up, are summed over tensor one by one: three sums more.
    tokens = COMPLETIONS * (PROMPT_TOKENS + MAX_TOKENS) / (layout.data * layout.fsdp)
    sums = 2 * 3 * config.layers * tokens * config.width * 4 * (layout.tensor - 1) / layout.tensor
    of_cpus = {"gradients over fsdp (again)": expected["gradients over fsdp"], "sums over tensor": sums}
    if rank:  # of which the side of the width alone is scattered; and a frozen table goes back to look rows up in it
        scattered = microbatches * config.layers * 7 * rank * config.width * 4 * (layout.fsdp - 1) / layout.fsdp
        of_cpus |= {"gradients over fsdp (again)": scattered, "table over fsdp (again)": expected["table over fsdp"]}
    want, got = (collections.defaultdict(float) for _ in range(2))  # by how many devices take part together
    for name, size in {**expected, **of_cpus}.items():
        axes = name.split(" over ")[1].removesuffix(" (again)").split(" x ")
        want[math.prod(getattr(layout, axis) for axis in axes)] += size
    rounds = [1, 1] if microbatches == 1 else [microbatches, 1, 1]
    for one in sent(compiled_update(config, layout, microbatches, rank), rounds):
        got[one.group] += one.bytes
    for group, size in got.items():
        # Ids, temperatures and masks of tokens, and gradients of norms go over fsdp too; metrics over all.
        more = 1.03 if group == layout.fsdp else 1.002
        assert want[group] <= size <= more * want[group] + 64, (group, want, got)
    assert {group for group, size in want.items() if size} <= {*got}


@pytest.mark.parametrize("layout", [floors.Layout(fsdp=4, tensor=2), floors.Layout(data=4, fsdp=2)])
def test_what_the_sampler_sends_is_what_xla_sends(layout):
    config = TransformerConfig(vocab_size=4096, layers=3, width=64, heads=4, kv_heads=2, head_width=16, mlp_width=192)
    model = floors.Model.of(config)
    prompts, group = 8, COMPLETIONS // 8
    step = floors.Step(
        prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS, lengths=np.full((prompts, group), MAX_TOKENS),
        compute_bytes=4, sampler_bytes=4, cache_bytes=4,
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig(data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor))
    sampler = Sampler(
        make_policy(config, mesh), mesh, ByteTokenizer("abcd"), group_size=group, max_tokens=MAX_TOKENS,
        max_prompt_tokens=PROMPT_TOKENS, key=jax.random.key(0), slots=COMPLETIONS,
    )  # fmt: skip
    shapes, axes = abstract_params(config)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    start, decode = sampler.compile(jax.tree.map(place, shapes, sharding.shardings(shapes, axes, mesh)), prompts)
    blocks = 2  # of the cache, each with a loop of its own, which go round so many times together
    rounds = {"prefill": (start, [1] * 4, 1), "decode": (decode, [MAX_TOKENS - 1] + [1] * 4, blocks)}
    # The choice of a token sends sums of blocks of the vocabulary over tensor, and each round of their search: in bytes
    # of a first token, with its group, and of one of those that follow.
    own = prompts / (layout.data * layout.fsdp)
    choice = {"prefill": (own, 8500), "decode": (own * group * (MAX_TOKENS - 1), 1450)}
    for name, (program, loops, times) in rounds.items():
        want, got = (collections.defaultdict(float) for _ in range(2))
        for what, size in getattr(floors, name)(model, step, layout).interconnect.items():
            want[getattr(layout, what.split(" over ")[1])] += size
        for one in sent(program.as_text(), loops):
            got[one.group] += one.bytes / times
        groups = {layout.fsdp}
        if name == "decode":  # the oldest slot's tokens, an integer at every token
            groups.add(shards := layout.data * layout.fsdp)
            want[shards] += 2 * 4 * (1 - 1 / shards) * (MAX_TOKENS - 1)
        assert all(want[group] <= got[group] <= 1.01 * want[group] for group in groups), (want, got)
        if layout.tensor > 1:
            tokens, each = choice[name]
            assert got[layout.tensor] - want[layout.tensor] == pytest.approx(tokens * each, rel=0.1)
    assert layout.tensor == 1 or got[layout.tensor] > 0  # of decoding; nothing else goes over fsdp for a token


def test_what_is_sent_is_counted():
    """Each kind, in loops of known and of computed length, and in what a fusion calls."""
    text = """
%inner (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%outer (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %b = bf16[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%cond (p: f32[8]) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[8] {
  %v = bf16[8]{0:T(8)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

%tpu (p: f32[8]) -> f32[8] {
  %u = f32[8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}

%fused (p: f32[8]) -> f32[8] {
  %c = (f32[2]{0}, f32[2]{0}) all-to-all(%p, %p), replica_groups=mesh['a'=2,'b'=4] {'a'}
  %d = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['a'=8] {'a':(1)2}, to_apply=%add
}

%windowed_cond (p: (f32[8], u32[])) -> pred[] {
  %half = u32[]{:T(128)} constant(16)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%at, %half), direction=LT
}

%windowed (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %two = u32[]{:T(128)S(6)} constant(2), metadata={op_name="x"}
  %from = u32[]{:T(128)} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%from, %two), control-predecessors={%from}
  %s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1}}
  ROOT %both = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) tuple(%s, %next)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %h = (f32[6]{0:T(8)}, u32[], token[]) send(%p, %token), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %o = (f32[8], u32[]) while(%p), condition=%windowed_cond, body=%windowed
  %x = f32[8] while(%p), condition=%c, body=%outer
  %y = f32[8] fusion(%x), kind=kCustom, calls=%fused
  %t = f32[8] while(%y), condition=%cond, body=%tpu
  %z = (f32[5]{0}, f32[5]{0}) collective-permute-start(%y), source_target_pairs={{0,1}}
}
"""
    found = {one.line.split()[0]: (one.kind, one.group, one.times, one.bytes) for one in sent(text, rounds=[7])}
    assert found == {
        "%a": ("all-reduce", 2, 21, 21 * 2 * 32 / 2), "%b": ("all-gather", 4, 7, 7 * 32 * 3 / 4),
        "%c": ("all-to-all", 2, 1, 16 / 2), "%d": ("reduce-scatter", 2, 1, 16),
        "%v": ("reduce-scatter", 4, 5, 5 * 16 * 3 / 4), "%z": ("collective-permute", 0, 1, 20),
        "%s": ("collective-permute", 0, 8, 8 * 16), "%h": ("slices", 3, 1, 2 * 24 * 2 / 3),
    }  # fmt: skip
