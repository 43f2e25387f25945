"""The benchmarks at tiny sizes: both sides do the same work, and what is said of it follows from what was measured."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    logprobs,
    measure,
    memory,
    packing,
    rewards,
    rollout,
    roofline,
    scaling,
    step,
    workload,
)
from experiments.benchmarks.profiles import Profiled
from experiments.benchmarks.workload import EOS, Ours, Workload
from grpo_jax.logprobs import unembed
from grpo_jax.models.pretrained import load, read_config
from grpo_jax.models.transformer import init_params, make_policy
from grpo_jax.sharding import make_mesh
from tests.test_benchmark_measure import TINY


@pytest.fixture(scope="module")
def peers():
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl", minversion="1.16")
    from experiments.benchmarks import peers

    torch.set_num_threads(1)  # several wait for one another longer than such small products take
    return peers


def check(result, program: str, metrics: set[str], sides: set[str], rounds: int = 2) -> None:
    """The fields of the JSON, and the ratios from the numbers."""
    again = json.loads(json.dumps(result))
    assert again["program"] == program
    assert again["command"].startswith(f"python -m experiments.benchmarks.{program}")
    assert {"cpu", "cores", "memory_bytes", "busy_cores", "devices"} <= set(again["machine"])
    assert {"python", "jax", "numpy"} <= set(again["versions"])
    assert set(again["measured"]) == sides
    for of in again["measured"].values():
        assert metrics <= set(of)
        for name in metrics:
            values = of[name]["values"]
            assert len(values) == rounds
            assert of[name]["min"] == min(values) <= of[name]["median"] == np.median(values) <= of[name]["max"]
    for peer in sides - {"ours"}:
        for name in (name for name in metrics if not name.endswith("_reward")):
            ours, theirs = (again["measured"][side][name]["values"] for side in ("ours", peer))
            expected = [a / b if name.endswith("_per_second") else b / a for a, b in zip(ours, theirs, strict=True)]
            assert again["ratios"][peer][name]["values"] == pytest.approx(expected)
            assert again["ratios"][peer][name]["median"] == pytest.approx(np.median(expected))
    shown = measure.said(result)
    assert again["command"] in shown
    assert again["machine"]["cpu"] in shown
    assert all(name.replace("_", " ") in shown for name in metrics)


# What both sides are given ---------------------------------------------------------------------------


def test_checkpoint_is_the_same_model_on_both_sides(peers, tmp_path):
    """The same configuration back, and the same greedy tokens in float32."""
    w = Workload(**{**TINY, "tokens": 12})
    peers.write_checkpoint(tmp_path, w.model, 3)
    assert read_config(tmp_path) == w.model
    model, normal = peers.load_model(tmp_path), peers.torch.randn_like
    with peers.torch.no_grad():  # as it is, a tied model says its last token again
        for parameter in model.parameters():
            parameter.add_(normal(parameter) * 0.15)
    model.save_pretrained(tmp_path)
    greedy = Ours(w, tmp_path).rollout(temperature=0.0)()
    ids = peers.torch.from_numpy(w.prompt_ids).long()
    out = model.generate(
        ids, attention_mask=peers.torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    theirs = out[:, ids.shape[1] :].numpy()
    assert len(np.unique(theirs)) > 4
    np.testing.assert_array_equal(greedy.completion_tokens.reshape(2, 3, 12), np.repeat(theirs[:, None], 3, axis=1))


def test_forced_lengths(peers):
    torch, limits = peers.torch, np.array([1, 3, 4, 2])
    processor, seen = peers.Lengths(limits, tokens=4), []
    for _ in range(4):
        scores = processor(None, torch.zeros(4, 6))
        seen.append(scores.argmax(dim=1).numpy() == EOS)
        free = torch.isfinite(scores).sum(dim=1)
        assert set(free.tolist()) <= {1, 5}  # the end alone, or all but the end
    ends = np.stack(seen, axis=1)
    assert [np.flatnonzero(row).tolist() for row in ends] == [[0], [2], [], [1]]  # a row as long as T is cut


def test_tokenizers_agree(peers):
    from grpo_jax.data.countdown import Countdown

    ours, theirs = Countdown.tokenizer, peers.character_tokenizer(Countdown.tokenizer.token_bytes)
    text = "7 50 3=22:(50-7)/3*1+0"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode([*ours.encode(text), 1, 0], skip_special_tokens=True) == text
    w = Workload(**TINY)
    numbers = peers.number_tokenizer(w.model.vocab_size)
    assert numbers(w.texts)["input_ids"] == w.prompt_ids.tolist()
    mine = workload.NumberTokenizer(w.model.vocab_size)
    assert [mine.encode(text) for text in w.texts] == w.prompt_ids.tolist()
    assert max(mine.eos_ids) >= w.model.vocab_size  # which nothing samples


# The programs ----------------------------------------------------------------------------------------


def test_rollout(peers):
    options = rollout.Options(**TINY, lengths="geometric")
    result = rollout.run(options)
    check(result, "rollout", {"seconds", "tokens_per_second"}, {"ours", "transformers"})
    assert result["lengths"] == options.limits.tolist()
    tokens = options.limits.sum()
    for of in result["measured"].values():
        speeds = [tokens / seconds for seconds in of["seconds"]["values"]]
        assert of["tokens_per_second"]["values"] == pytest.approx(speeds)
    assert any("tunix is left out" in note for note in result["notes"])
    assert result["mismatch"]["max"] < 1e-4


def test_what_integers_cost_is_measured():
    ours = workload.Ours(Workload(**TINY, sampler_dtype="int8"))
    assert 1e-5 < ours.mismatch(ours.rollout()())["mean"] < 0.05


def test_room_for_longer_prompts_changes_no_completion():
    sampled = [workload.Ours(Workload(**TINY, max_prompt_tokens=room)).rollout()() for room in (0, 300)]
    assert [x.prompt_tokens.shape[1] for x in sampled] == [TINY["prompt_tokens"], 300]
    np.testing.assert_array_equal(*(x.completion_tokens for x in sampled))
    with pytest.raises(ValueError, match="max_prompt_tokens=4 must be prompt_tokens=5 or more"):
        Workload(**TINY, max_prompt_tokens=4)


def test_a_side_of_other_lengths_is_an_error():
    w = Workload(**TINY, lengths="geometric")
    w.check(w.limits.reshape(-1), "ours")
    with pytest.raises(RuntimeError, match="peer made completions of"):
        rollout.timed(w, "peer", lambda: w.limits.reshape(-1) + 1)()


def test_step(peers, monkeypatch):
    written = []

    class Journal(workload.RewardJournal):
        def write(self, step, wave, digest, record):
            written.append((step, record["scores"]["reward"]))
            super().write(step, wave, digest, record)

    monkeypatch.setattr(workload, "RewardJournal", Journal)
    options = Profiled(**TINY, lengths="geometric", peer_microbatches=2)
    metrics = ("seconds", "generation_seconds", "update_seconds")
    result = step.run(options)
    check(result, "step", {*metrics}, {"ours", "trl"})
    for of in result["measured"].values():
        total, generation, update = (np.array(of[name]["values"]) for name in metrics)
        assert (update + generation <= total * 1.001).all()
        assert (generation > 0).all()
    assert [number for number, _ in written] == [0, 1, 2]  # ours took real steps, each with samples of its own
    assert len({tuple(rewards) for _, rewards in written}) == 3
    assert len(set(written[0][1])) > 1


def test_trl_takes_real_steps(peers, tmp_path):
    """With the lengths that were asked for, and parameters that move; an error in its thread is an error here."""
    w = Workload(**TINY, lengths="geometric")
    peers.write_checkpoint(tmp_path / "model", w.model, 0)
    trl = peers.TrlSteps(w, tmp_path / "model", tmp_path / "out")
    trl()
    trl()
    np.testing.assert_array_equal(trl._lengths, w.limits.reshape(-1))
    trl.close()
    trl._thread.join(timeout=10)
    assert not trl._thread.is_alive()
    broken = peers.TrlSteps(w, tmp_path / "model", tmp_path / "out")
    broken._reward = None
    broken._workload = None
    with pytest.raises(AttributeError):
        broken()


def test_memory(peers, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    options = memory.Options(**{**TINY, "rounds": 1}, what="rollout", repeats=1)
    metrics = {"imported_bytes", "loaded_bytes", "peak_bytes", "peak_beyond_imports_bytes", "peak_beyond_model_bytes"}
    result = memory.run(options)
    check(result, "memory", metrics, {"ours", "transformers"}, rounds=1)
    for of in result["measured"].values():
        imported, loaded, peak = (of[f"{name}_bytes"]["median"] for name in ("imported", "loaded", "peak"))
        assert 50 * 2**20 < imported <= loaded <= peak
        assert of["peak_beyond_imports_bytes"]["median"] == peak - imported
        assert of["peak_beyond_model_bytes"]["median"] == peak - loaded


def test_logprobs(peers):
    options = logprobs.Options(tokens=64, vocabulary=96, width=8, chunk=2048, rounds=2)
    result = logprobs.run(options)
    check(result, "logprobs", {"seconds"}, {"ours", "quarter chunks", "plain", "trl full", "trl chunked"})
    hidden, kernel, tokens, weights = (x.astype(np.float64) for x in logprobs.arguments(options))
    logits = hidden @ kernel.T
    of_tokens = np.take_along_axis(logits, tokens.astype(int)[..., None], -1)[..., 0]
    expected = (weights * (of_tokens - np.log(np.exp(logits).sum(-1)))).sum()
    for loss in result["losses"].values():
        assert loss == pytest.approx(expected, rel=1e-4)
    temporaries = {
        side: of["temporary_bytes"]["median"] for side, of in result["measured"].items() if side in logprobs.OURS
    }
    assert temporaries["quarter chunks"] < temporaries["ours"] < temporaries["plain"]
    with pytest.raises(ValueError, match="one chunk"):
        logprobs.Options(tokens=64, vocabulary=96)


def test_packing():
    result = packing.run(packing.Options(completions=8, prompt=4, limit=16, microbatches=4, width=32, rounds=2))
    check(result, "packing", {"seconds"}, {"ours", "a completion a row"})
    assert result["fill"]["ours"] > result["fill"]["a completion a row"]
    assert result["losses"]["ours"] == pytest.approx(result["losses"]["a completion a row"], abs=1e-5)
    assert result["parameters_differ"] < 1e-4


def test_scaling():
    options = scaling.Options(**{**TINY, "rounds": 1}, vary=("T", "G"), factors=(1.0,), memory=False)
    result = scaling.run(options)
    assert list(result["points"]["T"]) == ["8"]
    assert list(result["points"]["G"]) == ["3"]
    assert result["points"]["T"]["8"] == result["points"]["G"]["3"]  # the base point is measured once
    of = result["points"]["T"]["8"]
    assert of["rollout_tokens_per_second"] == [pytest.approx(6 * 8 / of["rollout_seconds"][0])]
    assert of["step_tokens_per_second"] == [pytest.approx(6 * 8 / of["step_seconds"][0])]
    assert result["exponents"] == {"T": {}, "G": {}}  # of one point


def test_exponents_of_sweeps(monkeypatch):
    def side(w, scratch):
        seconds = 1e-3 * w.tokens**2 if w.group == 4 else 0.5
        return lambda: {
            "rollout_seconds": seconds, "step_seconds": float(w.tokens), "rollout_tokens_per_second": 1 / seconds,
            "step_tokens_per_second": 1.0,
        }  # fmt: skip

    held = lambda module, alone, only: {"peak_beyond_model_bytes": 100 * alone.tokens**0.5}
    monkeypatch.setattr(scaling, "_side", side)
    monkeypatch.setattr(measure.gc, "collect", lambda: None)  # there is nothing to collect
    monkeypatch.setattr(measure, "fresh", held)
    options = scaling.Options(**{**TINY, "group": 4}, vary=("T", "G"), factors=(1.0, 2.0, 4.0))
    result = scaling.run(options)
    fitted = result["exponents"]["T"]
    assert {name: round(of["exponent"], 6) for name, of in fitted.items()} == {
        "rollout_seconds": 2.0, "step_seconds": 1.0, "bytes": 0.5,
    }  # fmt: skip
    assert {name: of["leaves"] for name, of in fitted.items()} == {
        "rollout_seconds": 8, "step_seconds": None, "bytes": None,
    }  # fmt: skip
    assert list(result["points"]["G"]) == ["4", "8"]  # 16 does not divide 8 completions
    assert result["exponents"]["G"]["step_seconds"]["exponent"] == pytest.approx(0)
    assert "| T | rollout tokens/s |" in measure.said(result)
    assert "| rollout, seconds | 2.00 | 0.00 | 8 |" in measure.said(result)


def test_points():
    options = scaling.Options(size="5m", factors=(0.5, 1.0, 2.0))
    points = {what: options.points(what) for what in options.vary}
    assert [(b, w.prompts, w.group, w.microbatches) for b, w in points["B"].items()] == [
        (32, 4, 8, 16), (64, 8, 8, 32), (128, 16, 8, 64),
    ]  # fmt: skip
    assert [(g, w.prompts * w.group) for g, w in points["G"].items()] == [(4, 64), (8, 64), (16, 64)]
    assert list(points["T"]) == [64, 128, 256]
    assert [(v, w.model.vocab_size) for v, w in points["V"].items()] == [(2048, 2048), (4096, 4096), (8192, 8192)]
    assert [w.size for w in points["N"].values()] == ["1m", "5m", "20m"]
    base = options.workload()
    assert sum(w == base for sweep in points.values() for w in sweep.values()) >= 3  # measured once


def test_fit():
    sizes = [1, 2, 4, 8]
    assert scaling.fit(sizes, [3 * x**1.5 for x in sizes]) == (pytest.approx(1.5), pytest.approx(0, abs=1e-9))
    # By hand: log2 of the costs 0, 1, 1, 2 over 0, 1, 2, 3: slope 0.6, residuals -0.1, 0.3, -0.3, 0.1, Sxx 5.
    exponent, error = scaling.fit(sizes, [1, 2, 2, 4])
    assert exponent == pytest.approx(0.6)
    assert error == pytest.approx((0.2 / 2 / 5) ** 0.5)
    assert scaling.leaves(sizes, [1, 2, 4, 16], 1.0) == 4
    assert scaling.leaves(sizes, [1, 2, 4, 8], 1.0) is None
    assert scaling.leaves(sizes, [1, 1, 2, 8], 1.0, at_most=True) == 4
    assert scaling.leaves(sizes, [1, 1, 2, 4], 1.0, at_most=True) is None


def test_roofline():
    result = roofline.run(roofline.Options(**TINY, copy_mib=1, matrix=64))
    shares = {"decode_share_of_copy", "decode_share_of_product", "update_share_of_product"}
    check(result, "roofline", shares | {"decode_seconds", "update_seconds"}, {"ours"})
    rates, of = result["machine_rates"], result["measured"]["ours"]
    assert set(rates) == {"copy_bytes_per_second", "float32_flop_per_second"}
    expected = [
        result["work"]["update_flop"] / s / rates["float32_flop_per_second"] for s in of["update_seconds"]["values"]
    ]
    assert of["update_share_of_product"]["values"] == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "width"), [("", 4), ("bfloat16", 2), ("int8", 4)])
def test_work_by_loops(dtype, width):
    """Bytes and FLOP of ragged completions, token by token."""
    w = Workload(**{**TINY, "tokens": 6}, lengths="geometric", sampler_dtype=dtype)
    m, limits = w.model, w.limits
    assert len(np.unique(limits)) > 2
    dense = m.layers * (
        m.width * m.heads * m.head_width * 2 + m.width * m.kv_heads * m.head_width * 2 + 3 * m.width * m.mlp_width
    )
    head, kv = m.vocab_size * m.width, 2 * m.kv_heads * m.head_width * m.layers * width
    per_key = 4 * m.heads * m.head_width * m.layers
    read = flop = update = 0
    for t in range(1, limits.max()):  # a token after the first
        read += 1000
        for group in limits:
            alive = [n for n in group if n > t]
            read += kv * w.prompt_tokens * bool(alive) + kv * t * len(alive)
            flop += sum(2 * (dense + head) + per_key * (w.prompt_tokens + t) for _ in alive)
    for n in limits.reshape(-1):
        columns = w.prompt_tokens + n
        update += 6 * (dense * columns + head * n) + 3 * per_key * columns * (columns + 1) / 2
    work = roofline.work_of(w, 1000, w.slots)
    assert (work.decode_bytes, work.decode_flop, work.update_flop) == pytest.approx((read, flop, update))


# Rewards ---------------------------------------------------------------------------------------------


def test_rewards():
    pytest.importorskip("math_verify")
    options = rewards.Options(items=20, group=4, workers=1, rounds=2)
    result = rewards.run(options)
    check(result, "rewards", {"empty_per_second"}, {"ours", "in process"})
    rates = {f"{kind}_per_second" for kind in (*rewards.KINDS, "known")}
    assert rates < set(result["measured"]["ours"])
    for kind in rewards.KINDS:
        completions, golds = rewards.problems(kind, options, 3)
        assert len(completions) == 20
        assert len(set(golds)) == 5
        right = sum(gold in text for text, gold in zip(completions, golds, strict=True))
        assert (right, len(set(completions))) == ((20, 5) if kind == "repeated" else (5, 20))
        assert rewards.problems(kind, options, 4)[0] != completions  # no turn is asked what another was


# Learning --------------------------------------------------------------------------------------------


def test_learning(peers, tmp_path, monkeypatch):
    from experiments import countdown
    from experiments.benchmarks import learning
    from grpo_jax.data.countdown import Countdown
    from grpo_jax.models.transformer import TransformerConfig

    config = {name: cls() for name, cls in countdown.SECTIONS.items() if name != "model"}
    config["model"] = TransformerConfig(
        vocab_size=Countdown.tokenizer.vocab_size, layers=1, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16
    )
    config["rollout"] = dataclasses.replace(config["rollout"], prompts=2, group_size=4)
    config["update"] = dataclasses.replace(config["update"], microbatches=2)
    config["train"] = dataclasses.replace(config["train"], steps=2)
    warm = init_params(config["model"], jax.random.key(5))
    monkeypatch.setattr(countdown, "warm_start", lambda experiment, workdir: warm)
    options = learning.Options(seeds=(3,))
    result = learning.compare(config, options, tmp_path)
    check(result, "learning", {"final_reward", "mean_reward", "seconds"}, {"ours", "trl"}, rounds=1)
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    for side in learning.SIDES:
        ((seed, rows),) = result["logs"][side].items()
        assert seed == "3"
        assert [row["step"] for row in rows] == [1, 2]
        means = result["measured"][side]["mean_reward"]["values"]
        assert means == pytest.approx([np.mean([row["reward"] for row in rows])])
    # The exported model computes what the warm start does.
    mesh, tokens = make_mesh(), jnp.asarray([Countdown.tokenizer.encode("7 5 3=22:7+5")])
    where = jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, jnp.int32)

    def logits(model, params):
        policy = make_policy(model)
        return unembed(policy.hidden(params, tokens, *where)[0], policy.head(params))

    directory = tmp_path / "model"
    exported = logits(read_config(directory), load(directory, mesh))
    np.testing.assert_array_equal(exported, logits(config["model"], warm))
    # Finished runs are read.
    monkeypatch.setattr(learning, "run_ours", None)
    monkeypatch.setattr(learning, "run_trl", None)
    assert learning.compare(config, options, tmp_path)["logs"] == result["logs"]
    with pytest.raises(ValueError, match="kl_coef"):
        learning.check({**config, "loss": dataclasses.replace(config["loss"], objective="dr_grpo")})


def test_noise():
    from experiments.benchmarks import learning

    assert learning.noise([1.0], [2.0]) is None
    # By hand: variances 2 and 8, means 2 and 4, standard error sqrt(2 / 2 + 8 / 2).
    assert learning.noise([1.0, 3.0], [2.0, 6.0]) == pytest.approx(-2 / 5**0.5)
