"""From a tiny model to an evaluated policy, with the commands that a user gives; and what they refuse."""

import fcntl
import json
import os
import pathlib
import shutil
import subprocess

import pytest
import tokenizers
from safetensors.numpy import load_file

from tests import processes

# Of four devices.
MESH = ["--mesh.fsdp=2", "--mesh.tensor=2"]
MEASURED = ["--policy.compute_dtype=float32", "--evaluation.prompts=6", "--evaluation.sampled_prompts=4",
            "--evaluation.samples=2"]  # fmt: skip


# `python -m`, where nobody can import what only tests need.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "transformers"]))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(module: str, *flags: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    return processes.python("-c", WITHOUT, f"experiments.{module}", *flags, devices=4, status=status, **variables)


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens_of(model: pathlib.Path, texts: list[str]) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return [len(tokenizer.encode(text).ids) for text in texts]


def questions(path: pathlib.Path) -> list[str]:
    return [f"Question:\n{row['question']}\nAnswer:\nLet's think step by step.\n" for row in rows(path)]


def make(place: pathlib.Path) -> None:
    """Everything below: problems and a model, what sft and gsm8k make of it, and their evaluations."""
    say = lambda name, done: (place / f"{name}.txt").write_text(done.stdout)
    tiny = place / "tiny"
    run("tiny_gsm8k", f"--output={tiny}", "--train=64", "--test=6")
    longest = max(tokens_of(tiny / "model", questions(tiny / "train.jsonl")))
    files = [f"--data.test_file={tiny / 'test.jsonl'}"]
    trained = [
        *files, f"--data.train_file={tiny / 'train.jsonl'}", f"--data.max_prompt_tokens={longest - 1}",
        "--train.steps=2", "--optimizer.warmup_steps=0", *MEASURED, *MESH,
    ]  # fmt: skip
    say("sft", run(
        "sft", f"--model={tiny / 'model'}", f"--workdir={place / 'sft'}", "--train.batch=8", "--train.max_tokens=24",
        "--optimizer.learning_rate=3e-4", "--evaluation.every=1", *trained,
    ))  # fmt: skip
    (place / "my_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    )
    # An untrained model's completions end, and so get different rewards, where a common letter ends them.
    again = [
        "gsm8k", f"--model={place / 'sft' / 'export'}", f"--workdir={place / 'grpo'}", "--rollout.prompts=4",
        "--rollout.group_size=2", "--rollout.max_tokens=16", "--rollout.stop=('e',)", "--reward.overlong=15",
        "--rollout.max_waves=2", "--update.microbatches=1", "--optimizer.learning_rate=1e-4", "--checkpoints.every=1",
        f"--reward={place / 'my_rewards.py'}:brevity=1e-9", *trained,
    ]  # fmt: skip
    say("grpo", run(*again, JAX_COMPILATION_CACHE_DIR=""))  # as users have it
    (place / "again.json").write_text(json.dumps(again))
    evaluate = lambda name, model, *flags: say(
        name, run("evaluate", f"--model={place / model}", f"--output={place / name}", *MEASURED, *flags)
    )
    whole = ["--completion.max_tokens=16", "--completion.stop=()", *MESH]
    evaluate("of_export", "grpo/export", *files, *whole)
    evaluate("of_workdir", "grpo", "--completion.stop=()", *MESH)
    evaluate("of_step", "grpo", *MESH, "--step=1", "--policy.sampler_dtype=bfloat16")
    say("prepare", run("prepare_gsm8k", f"--files={tiny}", f"--data_dir={place / 'tfds'}"))
    short = ["--completion.max_tokens=3", "--completion.stop=('on',)"]
    evaluate("of_tfds", "grpo/export", f"--data.directory={place / 'tfds'}", *short)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """Made once, also where several processes test."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / "gsm8k.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = root / "gsm8k"
        if not place.exists():
            place.mkdir()
            make(place)
            (root / "gsm8k.made").touch()
        assert (root / "gsm8k.made").exists(), "another process failed to make it, and says why"
    return place


def test_everything_a_run_leaves_is_there(made):
    weights = lambda directory: (directory / "model.safetensors").read_bytes()
    for name in ("sft", "grpo"):
        files = ("config.json", "metrics.jsonl", "samples.jsonl", "rewards.jsonl", "summary.json", "curve.png")
        assert all((made / name / file).is_file() for file in files)
        described = {path.name for path in (made / "tiny" / "model").iterdir()}
        assert {path.name for path in (made / name / "export").iterdir()} == described
        assert {path.name for path in (made / name / "model").iterdir()} == described - {"model.safetensors"}
        assert json.loads((made / name / "summary.json").read_text())["steps"] == 2
    assert len({weights(made / name) for name in ("tiny/model", "sft/export", "grpo/export")}) == 3


def test_both_extractions_are_reported(made):
    first, *steps = rows(made / "grpo" / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert {"rewards/strict/mean", "rewards/flexible/mean", "rewards/overlong/mean"} <= row.keys()
        assert row["rewards/brevity/mean"] < 0  # a user's own
    assert {"eval/accuracy", "eval/strict", "eval/strict/mean@2", "eval/maj@2", "eval/pass@2"} <= first.keys()
    assert first.keys() <= steps[1].keys()
    assert "eval/accuracy" not in steps[0]  # evaluation.every is 20, and in the other run 1
    assert "eval/accuracy" in rows(made / "sft" / "metrics.jsonl")[1]
    metrics = json.loads((made / "of_export" / "metrics.json").read_text())["metrics"]
    assert {"eval/accuracy", "eval/strict", "eval/mean@2", "eval/strict/mean@2", "eval/maj@1"} <= metrics.keys()
    for record in rows(made / "of_export" / "completions.jsonl"):
        assert record["rewards"].keys() == {"flexible", "strict"}


def test_batch_arithmetic_memory_and_what_is_dropped_are_said_before_anything_else(made):
    lengths = tokens_of(made / "tiny" / "model", questions(made / "tiny" / "train.jsonl"))
    dropped = lengths.count(max(lengths))
    cache, *said = (made / "grpo.txt").read_text().splitlines()
    assert cache.startswith("compilation cache: off, by default on CPUs")
    assert said[0] == (
        f"training problems: dropped {dropped} of 64 prompts: {dropped} longer than {max(lengths) - 1} tokens (the "
        f"longest has {max(lengths)}), 0 empty."
    )
    assert said[1].startswith("jax ")
    assert " on 4 x cpu; 1,799,360 parameters of " in said[1]
    assert said[2] == (
        "a step: 4 prompts x 2 = 8 completions of up to 16 tokens, in up to 2 waves; 1 epochs x 1 minibatches = 1 "
        "optimizer steps of 8 completions, 4 at a time on each of 2 data shards; with more --update.microbatches short "
        "ones would share rows and cost less"
    )
    brevity = next(line for line in said if line.startswith("reward brevity x 1e-09: -"))
    assert brevity.endswith(" of right answers, -0, -0 of empty ones")
    left = 64 - dropped
    assert said[3] == f"{left} training problems, an epoch is {left / 4:.1f} steps; 6 test problems"
    assert said[4].startswith("memory a device, estimated: 0.01 GiB (state 0.01 GiB, update ")

    train = rows(made / "tiny" / "train.jsonl")
    kept = [row["answer"] for row, length in zip(train, lengths, strict=True) if length < max(lengths)]
    short = sum(length < 24 for length in tokens_of(made / "tiny" / "model", kept))  # and the end
    assert 0 < short < left
    said = (made / "sft.txt").read_text().splitlines()
    assert said[3].startswith(f"{short} demonstrations ({left - short} more, the end included, have more than 24 ")


def test_the_exported_policy_is_the_last_checkpoint(made):
    read = lambda name: json.loads((made / name / "metrics.json").read_text())
    completions = lambda name: (made / name / "completions.jsonl").read_text()
    assert (read("of_workdir")["step"], read("of_step")["step"], read("of_export")["step"]) == (2, 1, None)
    assert completions("of_workdir") == completions("of_export")
    said = (made / "of_workdir.txt").read_text().splitlines()[0]
    test_file = str(made / "tiny" / "test.jsonl")
    # What the run had and no flag says; compute_dtype is given as well, sampler_dtype and stop differ.
    assert said == f"as in {made / 'grpo' / 'config.json'}: data.test_file={test_file!r} completion.max_tokens=16"
    taken = lambda name: {k: read(name)[k] for k in ("policy", "data", "completion")}
    whole = taken("of_workdir")
    differs = {
        "completion": {"max_tokens": 16, "stop": ["e"]},
        "policy": whole["policy"] | {"sampler_dtype": "bfloat16"},
    }
    assert taken("of_step") == whole | differs
    assert read("of_workdir")["metrics"] == read("of_export")["metrics"]
    assert completions("of_step") != completions("of_export")
    assert "grpo at step 1: 14 completions" in (made / "of_step.txt").read_text()  # 6 greedy, 2 each of 4


def test_tfds_has_the_same_problems_and_completions_end_where_they_are_told_to(made):
    assert (
        (made / "prepare.txt")
        .read_text()
        .strip()
        .endswith("64 train, 6 test; GSM8K has {'train': 7473, 'test': 1319}: is this another?")
    )
    greedy = lambda name: {
        record["prompt"]: record for record in rows(made / name / "completions.jsonl") if not record["temperature"]
    }
    whole, short = greedy("of_export"), greedy("of_tfds")
    assert whole.keys() == short.keys() == {*questions(made / "tiny" / "test.jsonl")}
    for prompt, record in short.items():
        assert record["columns"] == whole[prompt]["columns"]
        begun = record["completion"].rstrip("\ufffd")  # a character that is cut in two
        assert whole[prompt]["completion"].startswith(begun)
    everything = rows(made / "of_tfds" / "completions.jsonl")
    assert {record["finished"] for record in everything} == {True, False}
    for record in everything:
        assert record["finished"] == ("on" in record["completion"])
        assert record["tokens"] <= 3
        assert record["finished"] or record["tokens"] == 3


def test_transformers_reads_the_export_and_says_the_same(made):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export = made / "grpo" / "export"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    records = [record for record in rows(made / "of_export" / "completions.jsonl") if not record["temperature"]]
    assert len({record["completion"] for record in records}) > 1
    for record in records:
        prompt = tokenizer(record["prompt"], return_tensors="pt")
        said = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
        assert len(said) == record["tokens"]
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == record["completion"]


def test_a_finished_run_started_again_changes_nothing(made):
    def contents():
        own = lambda path: path.is_file() and "tensorboard" not in path.parts and path.name != ".lock"  # which says who
        files = filter(own, (made / "grpo").rglob("*"))
        return {path.relative_to(made): path.read_bytes() for path in files}

    before = contents()
    done = run(*json.loads((made / "again.json").read_text()))
    assert "grpo: all 2 steps are in " in done.stdout
    assert contents() == before


def test_a_run_goes_on_without_the_model_that_it_began_with(made, tmp_path):
    workdir, gone = tmp_path / "grpo", str(tmp_path / "gone")
    shutil.copytree(made / "grpo", workdir)
    for place in ("checkpoints/2", "export"):
        shutil.rmtree(workdir / place)
    (workdir / "summary.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "model": gone}))
    flags = [
        f for f in json.loads((made / "again.json").read_text()) if f.split("=")[0] not in ("--model", "--workdir")
    ]
    done = run(*flags, f"--model={gone}", f"--workdir={workdir}")
    assert "grpo: continuing at step 1" in done.stdout
    name = "export/model.safetensors"
    assert (workdir / name).read_bytes() == (made / "grpo" / name).read_bytes()


def test_adapters_train_go_on_and_begin_another_run(made, tmp_path):
    """Of a run that was killed behind its first step the same, to the bit; and what is written is the model's sum."""
    workdir, model = tmp_path / "lora", made / "sft" / "export"
    flags = [f for f in json.loads((made / "again.json").read_text()) if not f.startswith("--workdir")]
    flags += [
        "--lora.rank=2",
        "--lora.targets=('query','down')",
        "--loss.kl_coef=0.1",
        "--optimizer.learning_rate=0.01",
    ]
    said = run(*flags, f"--workdir={workdir}").stdout
    # Of 4 layers: queries 192 -> 192, and 576 -> 192.
    assert f" parameters of {model}, which are frozen; {4 * 2 * (384 + 768):,} of adapters beside them train" in said
    _, first, second = rows(workdir / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model as it was
    assert second["kl"] > 1e-6
    written = lambda place: {
        name: (place / name).read_bytes() for name in ("export/model.safetensors", "adapter/adapter_model.safetensors")
    }
    before = written(workdir)
    tensors = [load_file(place / "model.safetensors") for place in (model, workdir / "export")]
    changed = {name for name in tensors[0] if not (tensors[0][name] == tensors[1][name]).all()}
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{kind}.weight" for i in range(4) for kind in kinds}

    for place in ("checkpoints/2", "export", "adapter"):
        shutil.rmtree(workdir / place)
    (workdir / "summary.json").unlink()
    assert "grpo: continuing at step 1" in run(*flags, f"--workdir={workdir}").stdout
    assert written(workdir) == before
    evaluate = [f"--model={workdir}", f"--output={tmp_path / 'evaluation'}", *MEASURED, *MESH]
    run("evaluate", *evaluate)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["metrics"]
    last = rows(workdir / "metrics.jsonl")[-1]
    assert metrics == {name: last[name] for name in metrics}

    trained = [f for f in flags[1:] if f.split("=")[0] in ("--model", "--data.train_file", "--data.test_file")]
    again = ["sft", *trained, *MEASURED, "--train.steps=1", "--train.batch=4", "--train.max_tokens=24"]
    again += [f"--workdir={tmp_path / 'sft'}", f"--lora.adapter={workdir / 'adapter'}", *flags[-4:-2]]
    run(*again, "--lora.base_dtype=bfloat16", "--optimizer.learning_rate=0.0")
    assert (tmp_path / "sft" / "adapter" / "adapter_model.safetensors").read_bytes() == [*before.values()][1]


OF_RUN = """
import json, pathlib, sys
from absl import flags
from experiments import evaluate
from grpo_jax.telemetry import WorkdirError
for given in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["evaluate", "--model=m", "--output=o", *given])
    taken = evaluate.of_run(pathlib.Path(sys.argv[1]))
    print("taken", json.dumps({f"{k}.{field}": taken[k][field] for k in taken for field in taken[k]}))
"""


def test_an_evaluation_asks_what_the_run_asked(tmp_path):
    data = {"dataset": "gsm8k", "test_file": "t", "template": "r1", "instruction": "gsm8k", "judge": "strict",
            "max_prompt_tokens": 9, "train_file": "u"}  # fmt: skip
    saved = {"policy": {"compute_dtype": "float32", "remat": "full"}, "data": data, "train": {"max_tokens": 7}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    given = [[], ["--data.template=qa", "--completion.stop=('x',)"], ["--data.dataset=gsm8k"],
             ["--data.dataset=math500", "--data.test_file=v"]]  # fmt: skip
    done = processes.python("-c", OF_RUN, str(tmp_path), json.dumps(given)).stdout.splitlines()
    every, own, same, other = (json.loads(line[len("taken ") :]) for line in done if line.startswith("taken "))
    asked = {f"data.{name}": data[name] for name in ("dataset", "test_file", "template", "instruction", "judge")}
    assert every == {"policy.compute_dtype": "float32", **asked, "completion.max_tokens": 7, "completion.stop": []}
    assert set(every) - set(own) == {"data.template", "completion.stop"}
    assert set(every) - set(same) == {"data.dataset"}
    assert set(every) - set(other) == {"data.dataset", "data.test_file", "data.instruction", "data.judge"}

    (tmp_path / "config.json").write_text(json.dumps({"train": {}, "task": {}}))
    (tmp_path / "checkpoints").mkdir()
    refused = run("evaluate", f"--model={tmp_path}", f"--output={tmp_path / 'none'}", status=1)
    assert "is not of experiments.gsm8k or experiments.sft (experiments.countdown has --eval_only)" in refused.stderr


def test_a_tokenizer_of_another_text(tmp_path):
    file, place = tmp_path / "text.jsonl", tmp_path / "tiny"
    file.write_text(json.dumps({"question": "Zebra zebra?", "answer": "zebra\n#### 1"}) + "\n")
    flags = ["--train=8", "--test=4", f"--output={place}", f"--tokenizer_file={file}"]
    run("tiny_gsm8k", *flags, "--vocabulary=300")
    tokenizer = tokenizers.Tokenizer.from_file(str(place / "model" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == json.loads((place / "model" / "config.json").read_text())["vocab_size"] <= 300
    assert len(tokenizer.encode("zebra").ids) == 1 < len(tokenizer.encode("apples").ids)
    before = (place / "train.jsonl").read_bytes()
    again = run("tiny_gsm8k", *flags, "--seed=1", status=1)
    assert f"error: {place / 'model'} " in again.stderr
    assert (place / "train.jsonl").read_bytes() == before
    file.write_text(json.dumps({"question": "Zebra?", "answer": "none"}))
    assert f"error: {file}, line 1: answer 'none'" in run("tiny_gsm8k", *flags, status=1).stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("tiny")
    run("tiny_gsm8k", f"--output={place}", "--train=8", "--test=4")
    problem = {"problem": "1+1?", "answer": "2", "solution": "2", "unique_id": "a", "subject": "b", "level": 1}
    (place / "math500.jsonl").write_text(json.dumps(problem) + "\n")
    (place / "there").mkdir()
    (place / "there" / "metrics.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("gsm8k", ["--model=DIR/none"], "there is no directory DIR/none: expected a directory as downloaded from"),
        ("gsm8k", ["--data.train_file=DIR/none.jsonl"], "--data.train_file=DIR/none.jsonl is not a file"),
        ("gsm8k", ["--data.template=chat"], "this tokenizer has no chat template"),
        ("gsm8k", ["--rollout.prompts=3", "--update.microbatches=1", *MESH],
         "--rollout.prompts=3 does not divide over 2 devices (data x fsdp)"),
        ("gsm8k", ["--data.dataset=math500", "--data.test_file=DIR/math500.jsonl"],
         "dataset='math500' is for evaluation alone: train on gsm8k."),
        ("gsm8k", ["--reward=DIR/none.py:brevity"], "--reward=DIR/none.py:...: there is no file DIR/none.py."),
        ("gsm8k", ["--lora.rank=2", "--update.reference_every=1"], "reference_every=1: with adapters (LoRA) the"),
        ("gsm8k", ["--profile=3"], "--profile='3' must be FIRST:LAST"),
        ("gsm8k", ["--compilation_cache=DIR/train.jsonl/x"], "the compilation cache DIR/train.jsonl/x cannot"),
        ("sft", ["--profile=1:351"], "the profile is of steps 1 to 351, and the run has steps 1 to 350"),
        ("sft", ["--train.max_tokens=2"], "no solution has fewer than train.max_tokens=2 tokens: raise it."),
        ("sft", ["--data.train_file=", "--data.test_file=", "--data.directory=DIR/none"],
         "Prepare it: python -m experiments.prepare_gsm8k --data_dir=DIR/none"),
        ("evaluate", ["--step=1"], "--step is for the workdir of a run, and DIR/model has no checkpoints."),
        ("evaluate", ["--output=DIR/there"], "DIR/there/metrics.json is there already: name another --output"),
        ("evaluate", ["--data.judge=human"], "judge='human' of dataset='gsm8k' must be one of flexible, strict, "),
    ],
)  # fmt: skip
def test_bad_flags_are_one_clear_line_before_anything_is_written(tiny, tmp_path, module, flags, message):
    place = "--output" if module == "evaluate" else "--workdir"
    given = [f"--model={tiny / 'model'}", f"--data.test_file={tiny / 'test.jsonl'}", f"{place}={tmp_path / 'none'}"]
    if module != "evaluate":
        given.append(f"--data.train_file={tiny / 'train.jsonl'}")
    refused = run(module, *given, *(flag.replace("DIR", str(tiny)) for flag in flags), status=1)
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message.replace("DIR", str(tiny)) in errors[0]
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()


def test_help_of_evaluate_has_what_it_uses_and_no_more():
    shown = processes.python("-m", "experiments.evaluate", "--help", status=None).stdout
    named = {line.split(":")[0].strip() for line in shown.splitlines() if line.startswith("  --")}
    in_section = lambda section: {name.split(".")[1] for name in named if name.startswith(f"--{section}.")}
    assert in_section("completion") == {"max_tokens", "stop"}  # both are varied above
    assert in_section("policy") == {"compute_dtype", "sampler_dtype"}
    assert in_section("mesh") == {"data", "fsdp", "tensor"}
    assert not {"train_file", "max_prompt_tokens"} & in_section("data")
    assert "every" not in in_section("evaluation")
