"""Plans for chips that are not here: what fits is what compilers say, and formulas beside them."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import chips, plan, plan_report, tasks
from experiments.ahead_of_time import LossConfig, Planned, RolloutConfig, UpdateConfig, compiled, model_of
from grpo_jax import optimizers, sharding
from grpo_jax.models import lora, pretrained
from grpo_jax.models.shapes import shape
from grpo_jax.models.transformer import TransformerConfig
from tests import TPU_COMPILER

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = TransformerConfig(vocab_size=300, layers=2, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=48)


def config(**changes):
    """Sections of a small step."""
    values = {
        "rollout": RolloutConfig(prompts=8, group_size=4, max_tokens=16, max_prompt_tokens=8),
        "lora": lora.LoraConfig(), "loss": LossConfig(), "update": UpdateConfig(microbatches=2),
        "optimizer": optimizers.OptimizerConfig(), "mesh": sharding.MeshConfig(data=2, fsdp=2),
    }  # fmt: skip
    return values | changes


def test_what_a_device_holds_is_what_programs_are_given():
    """On CPU devices: the state of the train step, and what the sampler carries, by shapes and as compiled."""
    planned = Planned(CONFIG, config(), jax.devices(), None)
    found = {name: said for name, said, _ in compiled(planned)}
    assert list(found) == ["train", "reference", "start", "decode"]
    parameters = 4 * (2 * (32 * 8 * 12 + 3 * 32 * 48 + 2 * 32) + 300 * 32 + 32)
    assert planned.held["parameters"] == planned.held["reference"] == parameters // 2  # split over fsdp
    assert planned.held["optimizer"] == 2 * parameters // 2 + 2 * 4  # and two counts
    batch = 32 * (8 * 5 + 16 * 13 + 8) // 4
    assert found["train"]["arguments"] == sum(planned.held.values()) + 3 * 4 + batch  # and step, cursor, skipped
    assert sum(planned.sampled.values()) <= found["decode"]["arguments"] < sum(planned.sampled.values()) + 8192
    assert found["reference"]["temporaries"] > 0
    # Two sums of gradients; 4 rows of 24 columns a microbatch, of each of two layers its input and the MLP's, queries,
    # keys, values, what attention gives, gate and up; scores of all columns and their gradient.
    kept = 4 * 24 * 2 * (32 + 32 + 32 + 16 + 16 + 32 + 48 + 48) * 4
    assert planned.updated == {"gradients": parameters, "activations": kept + 2 * 4 * 4 * 24 * 24 * 4}
    assert kept < found["train"]["temporaries"]
    # Without a reference there is nothing to hold, and no pass.
    planned = Planned(CONFIG, config(loss=LossConfig(kl_coef=0.0)), jax.devices(), None)
    assert planned.held["reference"] == 0
    assert "reference" not in planned.work()
    assert not list(compiled(planned, ("reference",)))


def test_what_waits_between_steps_and_what_an_objective_asks_of_the_batch_are_counted():
    """With process supervision advantages and what waits have a number a token."""
    rollout = dataclasses.replace(config()["rollout"], max_waves=2)
    planned = Planned(
        CONFIG,
        config(rollout=rollout, loss=LossConfig(objective="grpo_process", kl_coef=0.0)),
        jax.devices(),
        None,
    )
    waiting = (8 * 8 * 5 + 32 * (16 * 13 + 1) + 8 * 4 * 4 + 32 * 16 * 4) // 4 + 4
    assert planned.held["groups that wait"] == waiting
    ((_, said, _),) = compiled(planned, ("train",))
    batch = 32 * (8 * 5 + 16 * 9 + 16 * 4 + 4) // 4
    assert said["arguments"] == sum(planned.held.values()) + 3 * 4 + batch


def test_work_with_adapters_is_that_of_what_trains():
    planned = Planned(CONFIG, config(lora=lora.LoraConfig(rank=2, base_dtype="bfloat16")), jax.devices(), None)
    trained, _ = planned.policy.split.parts(planned.state.params)
    own = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(trained))
    work = planned.work()
    assert work["update"].memory["optimizer"] == 7 * own
    whole = Planned(CONFIG, config(), jax.devices(), None).work()
    assert whole["update"].flop * 2 / 3 < work["update"].flop < whole["update"].flop
    assert work["prefill"].memory["weights"] < whole["prefill"].memory["weights"]


def test_a_model_is_a_shape_or_a_directory(tmp_path):
    policy = tasks.ModelConfig(attention="splash")
    of_shape = model_of("qwen2.5-0.5b", policy)
    assert of_shape == dataclasses.replace(
        shape("qwen2.5-0.5b"), compute_dtype="bfloat16", attention="splash", remat="full"
    )
    (tmp_path / "config.json").write_text(json.dumps(pretrained.write_config(shape("qwen2.5-0.5b"))))
    assert model_of(str(tmp_path), policy) == of_shape
    with pytest.raises(ValueError, match=r"--model=nowhere is no directory, and no shape that is known: qwen2\.5"):
        model_of("nowhere", policy)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2xx2", "h100:0", "h100:"])
def test_what_is_no_topology(topology):
    with pytest.raises(
        ValueError, match=f"topology='{topology}' must be a chip among v4, v5e, .* and how many: v5e:8x8"
    ):
        chips.chip_of(topology)


@pytest.mark.parametrize(("topology", "there"), [("v5e:3x1", "1x1, 2x2, .*, 16x16"), ("v5p:3x3x3", "multiples of 4")])
def test_slices_that_nobody_has(monkeypatch, topology, there):
    """libtpu ends the process for the first."""
    monkeypatch.setattr(chips, "_check_libtpu", lambda topology: None)
    with pytest.raises(ValueError, match=f"topology={topology}: there is no such slice. There are .*{there}"):
        chips.devices_of(topology)
    for sizes in ((4, 4, 4), (4, 8, 8), (2, 2, 1), (16, 16, 8)):
        chips._check_shape("v5p", sizes)


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="slices=2 of h100:8 must be 1 or more, and of GPUs 1: say hosts x GPUs"):
        chips.devices_of("h100:8", slices=2)


def test_a_libtpu_that_jax_does_not_go_with_is_refused(monkeypatch):
    """Its programs cannot all be read: `async-update instruction should have 1 operands but sees 3`."""
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(chips.metadata, "requires", lambda name: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"'])
    for installed in ("0.0.42", "0.0.42.1"):
        monkeypatch.setattr(chips.metadata, "version", lambda name, installed=installed: installed)
        chips._check_libtpu("v5e:1x1")
    for installed in ("0.0.45", "0.0.421", "0.0.4"):
        monkeypatch.setattr(chips.metadata, "version", lambda name, installed=installed: installed)
        with pytest.raises(
            ValueError, match=f"libtpu {installed} is installed, and jax .* goes with 0.0.42, which pip"
        ):
            chips.devices_of("v5e:1x1")


def test_chips_are_what_their_makers_say():
    for chip in chips.CHIPS.values():
        assert chip.source.startswith("https://")
        assert 8 <= chip.memory / 1e9 <= 200
        # Bytes of memory are dearer than FLOP, and bytes over links dearer still.
        assert chip.rates.flop > 50 * chip.rates.memory > 100 * chip.rates.interconnect
    for name in ("v5e", "v5p", "v6e"):
        assert 1e9 < chips.CHIPS[name].rates.network < chips.CHIPS[name].rates.interconnect / 10
    assert "core_count: 132" in chips.CHIPS["h100"].target


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
def test_a_mesh_of_fewer_devices_than_there_are_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", "--model=qwen2.5-0.5b", "--topology=v5e:2x2", "--mesh.fsdp=2"],
        cwd=ROOT, env=TPU_COMPILER, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: the mesh has 2 devices, and --topology=v5e:2x2 has 4: make --mesh.data x" in done.stderr


def planned_for(topology, directory, *flags):
    """What the command says and keeps of a small model on four devices."""
    model = dataclasses.replace(CONFIG, vocab_size=512, width=256, heads=2, head_width=128, mlp_width=256)
    (directory / "config.json").write_text(
        json.dumps(pretrained.write_config(dataclasses.replace(model, scale_embedding=False, qkv_bias=True)))
    )
    kept = directory / "plan.json"
    command = [
        sys.executable, "-m", "experiments.plan", f"--model={directory}", f"--topology={topology}", "--mesh.fsdp=4",
        "--update.microbatches=1", f"--json={kept}", *flags,
    ]  # fmt: skip
    environment = {**TPU_COMPILER, "JAX_OPTIMIZATION_LEVEL": "O0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1], json.loads(kept.read_text())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
@pytest.mark.parametrize(("prompts", "max_tokens"), [(4, 256), (4096, 2048)])
def test_the_command_plans_for_chips_that_are_not_here(prompts, max_tokens, tmp_path):
    """A small model on four v5e fits, and a step that is too large for them is a result and no crash."""
    said, result = planned_for(
        "v5e:2x2", tmp_path, f"--rollout.prompts={prompts}", f"--rollout.max_tokens={max_tokens}", "--programs=train"
    )
    assert (result["devices"], result["memory"], result["topology"]) == (4, 16e9, "v5e:2x2")
    train = result["programs"]["train"]
    if prompts == 4:
        assert train["fits"]
        assert said.startswith("train: ")
        assert "fits" in said
        assert train["total"] < 1e9
        # A floor is one, and of a model so small much is sent that it leaves out: see test_floors.py.
        formulas = sum(result["work"]["update"]["interconnect"].values())
        assert formulas < train["sent"] < 5 * formulas
    else:
        assert said.startswith("train: DOES NOT FIT by itself: ")
        assert " too many; compiled in " in said
        assert train["too_large"]["used"] > train["too_large"]["limit"] > 15e9


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version, and no GPU",
)
@pytest.mark.parametrize(("topology", "memory"), [("h100:4", 80e9), ("h200:2x2", 141e9)])
def test_the_command_plans_for_gpus_that_are_not_here(topology, memory, tmp_path):
    said, result = planned_for(topology, tmp_path, "--rollout.prompts=8", "--rollout.max_tokens=256")
    assert (result["devices"], result["memory"]) == (4, memory)
    assert [*result["programs"]] == ["train", "reference", "start", "decode"]
    for program in result["programs"].values():
        assert program["fits"]
        assert 1e6 < program["total"] < 1e9
    assert said.startswith("decode: ")
    # The kernel is compiled, and not interpreted, which copies the caches of a layer.
    assert result["programs"]["decode"]["temporaries"] < result["sampled"]["caches of completions"] / 8


def test_the_report_says_what_fits_and_what_does_not():
    planned = Planned(CONFIG, config(), jax.devices(), None)
    result = {
        **plan.report(planned, chips.CHIPS["v5e"], (), lambda _: None), "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
        "stopped": "not compiled within 5 s",
    }  # fmt: skip
    result["command"] = ["--model=m", "--rollout.prompts=8", "--update.microbatches=2", "--policy.sampler_dtype=int8"]
    program = {"seconds": 3.0, "peak_rss": 2e9, "total": 20e9, "fits": False}
    large = {**result, "programs": {"train": {**program, "arguments": 1, "temporaries": 1, "sent": 1e9}}}
    refusal = {"seconds": 3.0, "peak_rss": 2e9, "too_large": {"used": 25.3e9, "limit": 15.8e9}}
    cases = {
        "small": {**result, "programs": {}}, "large": large, "none": {"programs": {}, "stopped": "no"},
        "refused": {**result, "stopped": "", "programs": {"train": refusal}},
    }  # fmt: skip
    text = plan_report.table(cases)
    memory, floors, costs = text.split("\n\n")
    assert "| small | data=2 fsdp=2; 8; 2; int8 |" in memory
    assert memory.count("not compiled within 5 s") == 4 + 3
    assert "| 20.0 **too much** |" in memory
    assert "no, -4.0 left (start, decode unknown)" in memory
    assert "| no, 9.5 too much at least |" in memory
    assert "decode, by memory" in floors
    assert "| large | 3 (2.0) | - | - |" in costs
    assert "| large | 0.00 | 0.00 | 1.0 |" in plan_report.weak_table({"large": large})
    assert plan_report.options_table({"--a=1": large}).endswith("| 0.00 | 0.00 | 20.00 |")
    page = "a\n<!-- cases: python -m experiments.plan_report -->\nold\n<!-- end of cases -->\nb"
    assert plan_report.written(page, "cases", "new").splitlines() == [
        "a", "<!-- cases: python -m experiments.plan_report -->", "", "new", "", "<!-- end of cases -->", "b",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="needs the marks"):
        plan_report.written(page, "weak scaling", "new")


def test_the_page_is_what_is_kept_beside_it_and_of_the_cases_as_they_are():
    page = ROOT / "docs/scaling.md"
    kept, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    for name, cases, render in (
        ("cases", plan_report.CASES, plan_report.table), ("options", plan_report.OPTIONS, plan_report.options_table),
        ("weak scaling", plan_report.WEAK, plan_report.weak_table),
    ):  # fmt: skip
        assert [kept[case]["command"] for case in cases] == [case.command for case in cases.values()]
        assert plan_report.written(text, name, render({case: kept[case] for case in cases})) == text
