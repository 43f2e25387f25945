"""Evaluates a Hugging Face directory, or a checkpoint of a run of ours, on problems with checkable answers.

python -m experiments.evaluate --model=Qwen2.5-0.5B --output=runs/evaluation
python -m experiments.evaluate --model=runs/gsm8k --step=100 --output=runs/evaluation
python -m experiments.evaluate --model=DIR --output=OUT --data.dataset=math500 --data.test_file=test.jsonl \\
    --data.template=chat --data.instruction=boxed

A run's checkpoint is asked what the run asked (`data.*`, where a completion ends), unless flags say otherwise.
Writes `metrics.json` (greedy accuracy, pass@k, mean@k, maj@k) and `completions.jsonl`, each completion with its scores.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from experiments import flags as sections
from experiments import phases, process, runs, tasks
from experiments.flags import section
from grpo_jax import objectives, rollouts, sharding, storage
from grpo_jax.models import lora, pretrained
from grpo_jax.models.lora import LoraConfig
from grpo_jax.sampler import check_stop
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError, write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Where a completion ends."""

    max_tokens: int = 512  # it is cut there
    stop: tuple[str, ...] = ("\nQuestion:",)  # strings that end one, as a Python tuple: ('Question:',)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 1 or more.")
        check_stop(self.stop)


MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory, or the workdir of a run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of a workdir, the checkpoint to evaluate; the latest by default.")
OUTPUT = flags.DEFINE_string("output", None, "Where metrics.json and completions.jsonl are written.", required=True)
CACHE = sections.compilation_cache()
SECTIONS: dict[str, type[Any]] = {
    "policy": tasks.ModelConfig,
    "data": tasks.DataConfig,
    "completion": CompletionConfig,
    "mesh": sharding.MeshConfig,
    "evaluation": tasks.EvaluationConfig,
}
# Nothing trains here.
_SKIPPED = {"policy": ("attention", "remat"), "data": ("train_file", "max_prompt_tokens"), "evaluation": ("every",)}
FLAGS_OF = {name: section(name, cls, skip=_SKIPPED.get(name, ())) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them


def of_run(workdir: Path) -> dict[str, dict[str, Any]]:
    """How the run in a workdir put its problems, and where its completions end; flags that are given go before it."""
    saved = runs.saved_configuration(workdir)
    if not {"policy", "data"} <= saved.keys():
        raise WorkdirError(
            f"{workdir} is not of experiments.gsm8k or experiments.sft (experiments.countdown has --eval_only)."
        )
    ends = saved.get("rollout") or {"stop": (), **saved["train"]}  # of experiments.gsm8k, or of experiments.sft
    theirs = {**saved, "completion": {"max_tokens": ends["max_tokens"], "stop": tuple(ends["stop"])}}
    given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    if "data.dataset" in given and flags.FLAGS["data.dataset"].value != saved["data"]["dataset"]:
        given |= {f"data.{field}" for field in ("directory", "test_file", "instruction", "judge")}  # not of this one
    taken: dict[str, dict[str, Any]] = {}
    for name in ("policy", "data", "completion"):
        ours = [field for field in theirs[name] if f"{name}.{field}" in flags.FLAGS and f"{name}.{field}" not in given]
        taken[name] = {field: theirs[name][field] for field in ours}
    changed = [
        f"{name}.{field}={value!r}"
        for name, fields in taken.items()
        for field, value in fields.items()
        if value != flags.FLAGS[f"{name}.{field}"].value
    ]
    if changed:
        print(f"as in {workdir / 'config.json'}: {' '.join(changed)}", flush=True)
    return taken


def adapters_of(workdir: Path) -> LoraConfig:
    """What the run in a workdir trained: nothing in its configuration means all."""
    return LoraConfig(**runs.saved_configuration(workdir).get("lora", {}))


def checkpoint(workdir: Path, step: int | None, opened: tasks.Opened) -> tuple[Any, int]:
    """Parameters of a checkpoint of experiments.gsm8k or experiments.sft, and its step."""
    saved = runs.saved_configuration(workdir)
    objective, surplus = objectives.supervised(), None
    if "loss" in saved:
        objective = objectives.make_objective(objectives.LossConfig(**saved["loss"]))
        rollout = rollouts.RolloutConfig(**{**saved["rollout"], "stop": tuple(saved["rollout"]["stop"])})
        surplus = rollouts.surplus_of(
            rollout, objective, max_prompt_tokens=saved["data"]["max_prompt_tokens"], max_tokens=rollout.max_tokens
        )
    state = phases.restored(
        workdir, step, policy=opened.policy, model=opened.model, mesh=opened.mesh,
        optimizer=phases.optimizer_of(saved), objective=objective, surplus=surplus, lora=adapters_of(workdir),
    )  # fmt: skip
    return state.params, int(state.step)


def main(argv: list[str]) -> None:
    """Samples, scores, writes and prints."""
    output, given = runs.directory_of(argv, OUTPUT), runs.place_of(MODEL)
    if (output / "metrics.json").exists():
        sys.exit(f"error: {output / 'metrics.json'} is there already: name another --output, or remove it.")
    ours = (given / "checkpoints").is_dir()
    if STEP.value is not None and not ours:
        sys.exit(f"error: --step is for the workdir of a run, and {given} has no checkpoints.")
    directory = given / "model" if ours else given
    try:
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()}, of_run(given) if ours else None)
        print(process.cache_compilations(CACHE.value), flush=True)
        opened = tasks.Opened(directory, config)
        if ours:
            opened.policy = lora.adapted_policy(opened.policy, opened.model, adapters_of(given))
        evaluator = opened.task.evaluator(
            opened.policy, opened.mesh, config["evaluation"], max_tokens=config["completion"].max_tokens,
            stop=config["completion"].stop, copies=1,
        )  # fmt: skip
        params, step = checkpoint(given, STEP.value, opened) if ours else (pretrained.load(given, opened.mesh), None)
    except ValueError as error:
        sys.exit(f"error: {error}")
    storage.make_directory(output)
    print("compiling, half a minute or more, and sampling", flush=True)
    records = [record for sampled in (False, True) for record in evaluator.records(params, sampled=sampled)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(output / "completions.jsonl", lines)
    metrics = evaluator.summarize(records)
    described = {"model": str(given), "step": step, **runs.as_json(config), "metrics": metrics}
    write_atomically(output / "metrics.json", json.dumps(described, indent=2) + "\n")
    print(f"{given}{'' if step is None else f' at step {step}'}: {len(records)} completions; {process.devices()}")
    for name, value in metrics.items():
        count = name.endswith(("/not_applicable", "/failed"))
        print(f"  {name.removeprefix('eval/'):<28}{value:8.0f}" if count else f"  {name[5:]:<28}{value:8.2%}")
    lengths, cut = [r["tokens"] for r in records], sum(not r["finished"] for r in records)
    print(f"  mean length {sum(lengths) / len(lengths):.0f} tokens; {cut} cut at the limit; everything is in {output}")


if __name__ == "__main__":
    process.command(main)
