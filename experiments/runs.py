"""What experiments share of a run: its configuration and its workdir, what is said of both, summary and export."""

import dataclasses
import json
import logging as logging_of_python
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_STARTED = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags, logging  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from experiments import process  # noqa: E402
from grpo_jax import hosts, objectives, optimizers, storage, training  # noqa: E402
from grpo_jax.checkpoints import Checkpoints  # noqa: E402
from grpo_jax.models import peft, pretrained  # noqa: E402
from grpo_jax.models.lora import LoraConfig  # noqa: E402
from grpo_jax.models.transformer import TransformerConfig  # noqa: E402
from grpo_jax.optimizers import HOST  # noqa: E402
from grpo_jax.storage import Path  # noqa: E402
from grpo_jax.telemetry import WorkdirError, write_atomically  # noqa: E402

__all__ = [
    "as_json",
    "begun",
    "check_attention",
    "check_multiples",
    "check_offload",
    "complete",
    "configured",
    "description",
    "directory_of",
    "export",
    "finish",
    "keep_description",
    "place_of",
    "remarks",
    "saved_configuration",
    "saved_step",
    "summary",
]


def check_attention(config: TransformerConfig) -> None:
    """Raises ValueError where the devices that are there cannot compute attention as configured."""
    needed, platform = {"cudnn": "gpu", "splash": "tpu"}.get(config.attention), jax.devices()[0].platform
    if needed not in (None, platform):
        raise ValueError(f"--policy.attention={config.attention} needs a {needed}, and this is a {platform}: use xla.")
    if config.attention == "cudnn" and config.compute_dtype != "bfloat16":
        raise ValueError(f"--policy.attention=cudnn computes in bfloat16, not {config.compute_dtype}: use xla.")


def check_offload(optimizer: optimizers.OptimizerConfig, mesh: Mesh) -> None:
    """Raises ValueError where the optimizer's state is to lie in the host's memory, and the devices have none such."""
    device = mesh.local_devices[0]
    if not optimizer.offload:
        return
    if device.platform == "cpu":
        raise ValueError("--optimizer.offload: this is a cpu, whose memory is the host's: nothing would be gained.")
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(f"--optimizer.offload needs {HOST} memory, which {device.device_kind} has not: leave it out.")


def check_multiples(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where one of these sizes, by the name of its flag, does not divide over the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, size in sizes.items():
        if size % shards:
            raise ValueError(
                f"--{name}={size} does not divide over {shards} devices (data x fsdp): make it a multiple."
            )


def remarks(loss: objectives.LossConfig, update: training.UpdateConfig) -> str:
    """What is said of options that do not do what they seem to; empty where there is nothing to say."""
    names, default = ("clip_low", "clip_high", "dual_clip", "clamp", "mdpo_coef"), type(loss)()
    given = [f"--loss.{name}={getattr(loss, name)}" for name in names if getattr(loss, name) != getattr(default, name)]
    said = []
    if given and update.epochs * update.minibatches == 1 and loss.objective != "cispo":
        said.append(
            f"{', '.join(given)}: without effect, for with one optimizer step a rollout every ratio is 1; raise "
            "--update.minibatches or --update.epochs"
        )
    if loss.kl == "k1" and loss.kl_coef and not (loss.kl_in_reward or loss.weighted_kl):
        said.append(
            "--loss.kl=k1: its expected gradient on-policy is 0, so the loss holds nothing back; use k1+, "
            "--loss.kl_in_reward or --loss.weighted_kl"
        )
    return "".join(f"{line}\n" for line in said)


def complete(workdir: Path) -> bool:
    """Whether a run has come to its end, and all that it leaves is there."""
    return (workdir / "summary.json").exists()


def summary(
    workdir: Path, rows: list[dict[str, Any]], seed: int, parameters: int, started: float = _STARTED
) -> dict[str, Any]:
    """`summary.json`: what came out, and what it took; a run that was complete before keeps what it took then.

    `started`: by `time.perf_counter`, where the process has done other things before.
    """
    if complete(workdir):
        return json.loads((workdir / "summary.json").read_text())
    after = [row for row in rows if row["step"] > 0]
    # The first step compiles, and a median does not mind.
    median = lambda name: float(np.median([row[name] for row in after]))
    evaluations = lambda row: {name: value for name, value in row.items() if name.startswith("eval/")}
    packages = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
    return {
        "accuracy_before": rows[0]["eval/accuracy"],
        "accuracy_after": rows[-1]["eval/accuracy"],
        "before": evaluations(rows[0]),
        "after": evaluations(rows[-1]),
        "steps": rows[-1]["step"],
        "training_seconds": rows[-1]["time/elapsed_seconds"],
        "wall_seconds": time.perf_counter() - started,
        "rollout_tokens_per_second": median("time/rollout_tokens_per_second"),
        "train_tokens_per_second": median("time/train_tokens_per_second"),
        "peak_rss_bytes": process.peak_rss(),
        "seed": seed,
        "parameters": parameters,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), **{name: process.version(name) for name in packages}},
    }


def finish(workdir: Path, rows: list[dict[str, Any]], summarized: Mapping[str, Any], title: str) -> None:
    """Writes `curve.png` and `summary.json`."""
    from experiments import plots  # imports matplotlib: half a second

    def write() -> None:
        plots.curve(rows, workdir / "curve.png", f"{title}, seed {summarized['seed']}")
        write_atomically(workdir / "summary.json", json.dumps(summarized, indent=2) + "\n")

    hosts.first_does(write, kind=WorkdirError)


def directory_of(argv: list[str], flag: flags.FlagHolder) -> Path:
    """`place_of` a flag, once the command line is what it should be."""
    process.no_arguments(argv)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes a page of INFO lines a checkpoint
        logging_of_python.getLogger("grpo_jax").setLevel("INFO")  # how well programs are isolated
    if not flag.value.strip():
        sys.exit(f"error: --{flag.name} is empty: name a directory.")
    place = place_of(flag)
    if not storage.is_remote(place) and place.is_file():
        sys.exit(f"error: --{flag.name}={flag.value} is a file: name a directory.")
    return place


def place_of(flag: flags.FlagHolder) -> Path:
    """What a flag names, on disk or in a store; ends with a line where it is in one that cannot be read."""
    try:
        place = storage.path(flag.value)
        storage.check(place)
    except ValueError as error:
        sys.exit(f"error: --{flag.name}: {error}")
    return place


def configured(makers: Mapping[str, Callable[..., Any]], saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every section, as its flags make it, or as it was saved.

    Raises:
      ValueError: a value that a section refuses.
    """
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make(**(saved or {}).get(name, {}))
        except ValueError as error:
            raise ValueError(f"--{name}.*: {error}") from error
    return made


def saved_configuration(workdir: Path) -> dict[str, Any]:
    """`config.json` of a workdir.

    Raises:
      WorkdirError: there is none, or it is not JSON.
    """
    try:
        return json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{workdir} is not the workdir of a run: config.json: {error}") from error


def as_json(config: Mapping[str, Any], deterministic: bool = False) -> dict[str, Any]:
    """Sections as plain values, for `open_workdir`; and that kernels are deterministic, where they are to be."""
    said = {"deterministic": True} if deterministic else {}
    return {**said, **{name: dataclasses.asdict(section) for name, section in config.items()}}


def saved_step(workdir: Path) -> int | None:
    """Of the newest checkpoint; None: there is none to go on from. Of several processes, all must ask."""
    place = workdir / "checkpoints"
    steps = Checkpoints(place, read_only=True).steps if hosts.is_first() and place.is_dir() else []
    newest = hosts.agreed(steps[-1] if steps else -1)  # a network's file system may show the others less
    return None if newest < 0 else newest


def begun(workdir: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return saved_step(workdir) is not None


def description(model: Path, workdir: Path) -> Path:
    """Where a run reads all but the weights: once it has begun what it kept, else the model's own directory.

    Raises:
      ValueError: the model lies where the run would keep that.
    """
    whole = lambda place: place if storage.is_remote(place) else place.resolve()
    if whole(workdir / "model") in (whole(model), *whole(model).parents):
        raise ValueError(
            f"--model={model} lies where a run in --workdir={workdir} keeps what it was given: move it, or choose "
            "another --workdir."
        )
    return workdir / "model" if begun(workdir) and saved_configuration(workdir)["model"] == str(model) else model


def keep_description(model: Path, workdir: Path) -> None:
    """Copies all but the weights of a Hugging Face directory into the workdir, for what comes after the start."""

    def keep() -> None:
        storage.remove_tree(workdir / "model")
        pretrained.copy_description(model, workdir / "model")

    if not begun(workdir):  # what a start that failed has left may be of other files
        hosts.first_does(keep, kind=pretrained.PretrainedError)


def export(
    workdir: Path, params: Any, config: TransformerConfig, extra: Mapping[str, Any] | None = None,
    lora: LoraConfig = LoraConfig(),
) -> Path:  # fmt: skip
    """Writes parameters as a Hugging Face directory into the workdir, as the model that they came from was saved.

    Of a model with adapters the sum, and into `adapter/` those alone, in PEFT's format.

    `extra`: entries of config.json.
    """
    place, source = workdir / "export", workdir / "model"
    # A finished run that is started again has it. In a store config.json is written last: without it there is a rest.
    whole = place / "config.json" if storage.is_remote(place) else place
    if hosts.agreed(hosts.is_first() and not whole.exists()):
        if hosts.is_first() and storage.is_remote(place):
            storage.remove_tree(place)
        if lora.rank:
            if hosts.is_first():
                storage.remove_tree(workdir / "adapter")  # of a start that was killed behind it
            peft.save(workdir / "adapter", params, config, lora, base=saved_configuration(workdir)["model"])
        pretrained.save(place, params, config, source=source, dtype=pretrained.saved_dtype(source), extra=extra)
    return place
