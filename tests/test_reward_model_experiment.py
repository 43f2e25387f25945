"""A reward model from preferences with the commands that a user gives, killed and gone on with; and as a reward."""

import json
import pathlib
import shutil
import subprocess

import pytest

from experiments import scorers
from grpo_jax import sharding
from grpo_jax.data.tokenizer import PretrainedTokenizer
from tests import processes
from tests.ends import last_state, untimed
from tests.test_gsm8k import run

# For bad meshes; other tests have scores and steps on all kinds.
DEVICES = 2


def train(workdir: pathlib.Path, *flags: str, kill_at: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [f"--workdir={workdir}", *flags]
    return processes.killed("reward_model", kill_at, *command, status=status, devices=DEVICES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A model, and preferences for worked answers over bare numbers."""
    place = tmp_path_factory.mktemp("preferences")
    run("tiny_gsm8k", f"--output={place}", "--train=40", "--test=12")
    for split in ("train", "test"):
        problems = [json.loads(line) for line in (place / f"{split}.jsonl").read_text().splitlines()]
        pairs = [
            {"prompt": p["question"], "chosen": f"1+1=2\n{p['answer']}", "rejected": "#### 0", "margin": i % 2}
            for i, p in enumerate(problems)
        ]
        (place / f"{split}_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return place


def flags_of(place: pathlib.Path) -> list[str]:
    return [
        f"--model={place / 'model'}", f"--data.train_file={place / 'train_pairs.jsonl'}",
        f"--data.test_file={place / 'test_pairs.jsonl'}", "--data.template=qa", "--policy.compute_dtype=float32",
        "--policy.remat=none", "--train.steps=4", "--train.batch=8", "--optimizer.learning_rate=1e-2",
        "--optimizer.warmup_steps=0", "--evaluation.every=2", "--checkpoints.every=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny) -> pathlib.Path:
    done = train(tiny / "reward_model", *flags_of(tiny))
    assert "held-out accuracy 50.0% -> " in done.stdout  # a score that begins at 0 says nothing
    return tiny


def test_it_learns_and_leaves_what_every_run_leaves(made):
    workdir = made / "reward_model"
    rows = untimed(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["eval/accuracy"] == 0.5
    assert rows[-1]["eval/accuracy"] > 0.6
    assert rows[0]["eval/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["eval/loss"] < 0.9 * rows[0]["eval/loss"]
    assert {"accuracy", "margin", "calibration", "loss", "grad_norm", "eval/calibration_error"} <= rows[-1].keys()
    bins = json.loads((workdir / "reliability.json").read_text())
    assert len(bins) == 10
    assert sum(b["count"] for b in bins) == 12
    assert (workdir / "reliability.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((workdir / "export" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert len(config["id2label"]) == 1
    assert (workdir / "export" / "tokenizer.json").is_file()
    assert json.loads((workdir / "summary.json").read_text())["accuracy_after"] == rows[-1]["eval/accuracy"]


def test_transformers_says_the_same_scores_of_the_export(made):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export = made / "reward_model" / "export"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    ahead = []
    for line in (made / "test_pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        prompt = f"Question:\n{pair['prompt']}\nAnswer:\nLet's think step by step.\n"
        ids = [tokenizer(prompt)["input_ids"] + tokenizer(pair[name])["input_ids"] for name in ("chosen", "rejected")]
        end = [tokenizer.eos_token_id]
        with torch.no_grad():
            ahead.append(float(torch.sub(*(theirs(torch.tensor([line + end])).logits[0, 0] for line in ids))))
    rows = untimed(made / "reward_model" / "metrics.jsonl")
    assert sum(ahead) / len(ahead) == pytest.approx(rows[-1]["eval/margin"], abs=1e-3)


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(made):
    train(made / "killed", *flags_of(made), kill_at="update:2")
    done = train(made / "killed", *flags_of(made))
    assert "reward model: continuing at step 2" in done.stdout
    assert untimed(made / "killed" / "metrics.jsonl") == untimed(made / "reward_model" / "metrics.jsonl")
    ours, theirs = last_state(made / "killed"), last_state(made / "reward_model")
    assert any("score" in name for name in ours)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def test_grpo_with_it_as_a_reward(made):
    done = run(
        "gsm8k", f"--model={made / 'model'}", f"--workdir={made / 'grpo'}", f"--data.train_file={made / 'train.jsonl'}",
        f"--data.test_file={made / 'test.jsonl'}", "--rollout.prompts=2", "--rollout.group_size=2",
        "--rollout.max_tokens=8", "--update.microbatches=1", "--train.steps=1", "--policy.compute_dtype=float32",
        "--policy.remat=none", "--evaluation.prompts=2", "--evaluation.sampled_prompts=2", "--evaluation.samples=2",
        "--loss.kl_coef=0", f"--reward_model.directory={made / 'reward_model'}",
        "--reward_model.weight=0.5",
    )  # fmt: skip
    assert f"reward model: {made / 'reward_model'}, " in done.stdout
    assert "asked as tokens" in done.stdout
    (row,) = [json.loads(line) for line in (made / "grpo" / "rewards.jsonl").read_text().splitlines()]
    assert len({*row["scores"]["reward_model"]}) > 1
    metrics = untimed(made / "grpo" / "metrics.jsonl")[1]
    mean = lambda name: metrics[f"rewards/{name}/mean"]
    assert metrics["reward"] == pytest.approx(mean("flexible") + 0.5 * mean("reward_model"), abs=1e-5)


def ask(directory: pathlib.Path, tokenizer: PretrainedTokenizer, **options) -> list[float]:
    config = scorers.RewardModelConfig(directory=str(directory), **options)
    reward = scorers.OpenedScorer(config, sharding.make_mesh()).reward(tokenizer)
    assert (reward.name, reward.weight) == ("reward_model", config.weight)
    texts = ["1+1=2\n#### 2", "#### 0", "9"]
    ids = [[*tokenizer.encode(text, continues=True), *tokenizer.eos_ids] for text in texts]
    return reward.function(prompts=["Why?"] * 3, completions=texts, completion_ids=ids)


def test_from_its_workdir_or_its_export_as_tokens_or_through_text(made, tmp_path, capsys):
    tokenizer = PretrainedTokenizer.load(made / "model")
    of_workdir = ask(made / "reward_model", tokenizer, compute_dtype="float32")
    assert "asked as tokens" in capsys.readouterr().out
    export = tmp_path / "export"
    shutil.copytree(made / "reward_model" / "export", export)
    assert ask(export, tokenizer, compute_dtype="float32", weight=2.0) == of_workdir
    assert ask(export, tokenizer) != of_workdir  # bfloat16
    capsys.readouterr()
    # The same ids for the same texts, and one more, which makes it another tokenizer.
    described = json.loads((export / "tokenizer.json").read_text())
    more = {**described["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<|more|>"}
    described["added_tokens"].append(more)
    (export / "tokenizer.json").write_text(json.dumps(described))
    assert ask(export, tokenizer, compute_dtype="float32") == of_workdir
    assert "asked through text, for its tokenizer is another" in capsys.readouterr().out


def test_what_is_no_reward_model_is_said(made, tmp_path):
    opened = lambda place: scorers.OpenedScorer(scorers.RewardModelConfig(directory=str(place)), sharding.make_mesh())
    with pytest.raises(ValueError, match="holds a language model, which has no score"):
        opened(made / "model")
    with pytest.raises(ValueError, match=r"there is no config\.json in"):
        opened(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "rollout": {}, "reward": {"format": 0}}))
    with pytest.raises(ValueError, match="is the workdir of another experiment"):
        opened(tmp_path)


def test_one_that_does_not_fit_is_refused_before_it_is_read(made, monkeypatch):
    monkeypatch.setattr(scorers, "least_memory", lambda: 2**10)
    config = scorers.RewardModelConfig(directory=str(made / "reward_model"))
    with pytest.raises(ValueError, match=r"takes 0\.00 GiB of each of 2 devices, which have 0\.00 GiB: take a smaller"):
        scorers.OpenedScorer(config, sharding.make_mesh(sharding.MeshConfig(fsdp=2)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.train_file=DIR/none.jsonl"], "--data.train_file=DIR/none.jsonl is not a file"),
        (["--train.batch=3", "--mesh.fsdp=2"], "--train.batch=3 does not divide over 2 devices"),
    ],
)
def test_bad_flags_are_one_clear_line_before_anything_is_written(tiny, tmp_path, flags, message):
    refused = train(tmp_path / "none", *flags_of(tiny), *(flag.replace("DIR", str(tiny)) for flag in flags), status=1)
    assert message.replace("DIR", str(tiny)) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()


def test_every_flag_changes_something(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    )
    done = processes.python("-m", "tests.flags_of_reward_model", str(model), str(tmp_path), devices=DEVICES)
    assert json.loads(done.stdout.splitlines()[-1]) == {"idle": [], "not covered": [], "unexplained": []}
