"""What the experiments share: the workdir, what a run says of itself, the summary, errors as one line."""

import dataclasses
import json
import logging as logging_of_python
import os
import pathlib
import platform
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from importlib import metadata
from types import FrameType
from typing import Any

_STARTED = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from grpo_jax import hosts, objectives, optimizers, sharding, storage, training  # noqa: E402
from grpo_jax.checkpoints import Checkpoints  # noqa: E402
from grpo_jax.guard import NotFiniteError  # noqa: E402
from grpo_jax.models import peft, pretrained  # noqa: E402
from grpo_jax.models.lora import LoraConfig  # noqa: E402
from grpo_jax.models.transformer import TransformerConfig  # noqa: E402
from grpo_jax.optimizers import HOST  # noqa: E402
from grpo_jax.rewards import RewardError  # noqa: E402
from grpo_jax.storage import Path  # noqa: E402
from grpo_jax.telemetry import WorkdirError, write_atomically  # noqa: E402

__all__ = [
    "as_json",
    "begun",
    "cache_compilations",
    "check_attention",
    "check_multiples",
    "check_offload",
    "command",
    "complete",
    "configured",
    "description",
    "devices",
    "directory_of",
    "enough_threads",
    "export",
    "finish",
    "interruptible",
    "join_hosts",
    "keep_description",
    "make_deterministic",
    "peak_rss",
    "place_of",
    "remarks",
    "resident",
    "said_of_deterministic",
    "saved_configuration",
    "saved_step",
    "summary",
]


def devices() -> str:
    """What runs, in words."""
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"jax {jax.__version__} on {len(jax.devices())} x {jax.devices()[0].device_kind}{processes}"


def join_hosts(asked: str | None) -> None:
    """`hosts.initialize`, as `--distributed` says, before JAX is asked for anything."""
    if said := hosts.initialize(asked):
        print(said, flush=True)


def cache_compilations(asked: str | None, platform: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Says where JAX keeps compiled programs from one process to the next; to be called before the first is compiled.

    Args:
      asked: `auto`, `off` or a directory, which may be an address such as gs://bucket/cache.
      platform: cpu, gpu or tpu; None: the one that is here.
      environ: whose JAX_COMPILATION_CACHE_DIR, XDG_CACHE_HOME and HOME count.

    Returns:
      A line for the screen.

    Raises:
      ValueError: it is none of these, or the directory cannot be written.
    """
    if not asked:
        raise ValueError(f"--compilation_cache={asked or ''} must be auto, off or a directory.")
    given = environ.get("JAX_COMPILATION_CACHE_DIR") if asked == "auto" else asked
    on = given or (platform or jax.default_backend()) != "cpu"
    if asked == "off" or not on:
        jax.config.update("jax_enable_compilation_cache", False)
        # What XLA keeps for CPUs is not reliable in these versions: it may be loaded where it does not run.
        return "compilation cache: off" + ("" if on else ", by default on CPUs; --compilation_cache=DIR switches it on")
    user = environ.get("XDG_CACHE_HOME") or str(pathlib.Path(environ.get("HOME", "~"), ".cache").expanduser())
    place = given or f"{user}/grpo_jax/xla"
    try:
        if "://" not in place:
            pathlib.Path(place).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if given:
            raise ValueError(
                f"the compilation cache {place} cannot be written: {error}. Name another, or off."
            ) from error
        jax.config.update("jax_enable_compilation_cache", False)
        return f"compilation cache: off, for {place} cannot be written ({error}); --compilation_cache=DIR names another"
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", place)
    # By default programs that compile within a second are left out: they are many, and together take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return f"compilation cache: {place}"


def make_deterministic(workdir: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Has the compiler for GPUs use kernels that give the same bits every time, and the same ones in every process.

    To be called before anything starts JAX's backend, for the compiler reads its flags once. It leaves out kernels that
    add in any order (`--xla_gpu_exclude_nondeterministic_ops`), and takes the others without measuring them (jaxlib
    0.11.2); a version that does measure keeps in the workdir which were the fastest, for another process would measure
    again and might choose others.

    Args:
      workdir: of the run; nothing is written there before the compiler does.
      environ: whose XLA_FLAGS it adds to; where a flag is there twice, the last one counts.
    """
    directory = workdir if storage.is_remote(workdir) else workdir.absolute()
    place = directory / "xla" / f"jaxlib-{_version('jaxlib')}"  # what one version chose is not for another
    ours = f'--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_per_fusion_autotune_cache_dir="{place}"'
    environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {ours}".strip()
    # JAX itself would name a place beside its compiled programs, which may be gone tomorrow.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def said_of_deterministic(workdir: Path) -> str:
    """A line for the screen; it starts JAX's backend, after `make_deterministic`.

    Raises:
      ValueError: a GPU's compiler may have choices to keep, which it does on disk alone, and the workdir is in a store.
    """
    if (platform := jax.default_backend()) != "gpu":
        return f"--deterministic changes nothing on a {platform}, where runs repeat anyway"
    if storage.is_remote(workdir):
        raise ValueError(f"--deterministic: the compiler keeps its choices on disk alone, and --workdir is {workdir}.")
    return "deterministic kernels, the same in every process"


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


def resident(name: str) -> int | None:
    """Bytes that Linux says of this process: `VmRSS`, those it holds now, or `VmHWM`, the most it has held."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def peak_rss() -> int:
    """The most bytes of the host's memory that this process has held.

    Linux' `ru_maxrss` begins at what the parent held when it started this one, and `VmHWM` does not.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        "peak_rss_bytes": peak_rss(),
        "seed": seed,
        "parameters": parameters,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def finish(workdir: Path, rows: list[dict[str, Any]], summarized: Mapping[str, Any], title: str) -> None:
    """Writes `curve.png` and `summary.json`."""
    from experiments import plots  # imports matplotlib: half a second

    def write() -> None:
        plots.curve(rows, workdir / "curve.png", f"{title}, seed {summarized['seed']}")
        write_atomically(workdir / "summary.json", json.dumps(summarized, indent=2) + "\n")

    hosts.first_does(write, kind=WorkdirError)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def directory_of(argv: list[str], flag: flags.FlagHolder) -> Path:
    """`place_of` a flag, once the command line is what it should be."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes a page of INFO lines a checkpoint
        logging_of_python.getLogger("grpo_jax").setLevel("INFO")  # how well programs are isolated
    if not flag.value.strip():
        raise app.UsageError(f"--{flag.name} is empty: name a directory.")
    return place_of(flag)


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
    return {name: make(**(saved or {}).get(name, {})) for name, make in makers.items()}


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
    """Sections as plain values, for `loop.open_workdir`; and that kernels are deterministic, where they are to be."""
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
    """Where a run reads all but the weights: once it has begun what it kept, else the model's own directory."""
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


# What collectives and JAX's coordination service say where a process does not answer.
_LOST = re.compile("gloo|nccl|connection|unavailable|deadline_exceeded|heartbeat|coordination", re.IGNORECASE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Python's own handler of Ctrl-C, but for where its exception would be lost.

    JAX asks to be called by the garbage collector, often first after a long compilation, and what is raised there is
    printed and ignored: so it waits a moment.
    """
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def enough_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets a CPU that the environment makes several devices of have `cpu_threads`; PJRT_NPROC that is set wins."""
    asked = re.findall(r"--xla_force_host_platform_device_count=[\"']?(\d+)", environ.get("XLA_FLAGS", ""))
    asked += re.findall(r"^\d+$", environ.get("JAX_NUM_CPU_DEVICES", ""))
    if asked:
        environ.setdefault("PJRT_NPROC", str(sharding.cpu_threads(max(map(int, asked)))))


def interruptible(main: Callable[[list[str]], None]) -> None:
    """absl's `app.run`, in which Ctrl-C is one line and the status that shells expect."""
    enough_threads()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app.run(main)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is saved", file=sys.stderr)
        hosts.ends_with(128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)


def command(main: Callable[[list[str]], None]) -> None:
    """`interruptible`, with the errors that a user can mend as one line instead of a traceback."""
    try:
        interruptible(main)
    except (
        WorkdirError, RewardError, NotFiniteError, pretrained.PretrainedError, hosts.HostError, OSError,
    ) as error:  # fmt: skip
        hosts.ends_with(1)
        if error.__cause__ is not None and isinstance(error, RewardError):
            traceback.print_exception(error.__cause__)  # where in the user's function it went wrong
        told = str(error).startswith("process ")  # to all, by `hosts.together`
        sys.exit(f"error: {'' if told else _whose()}{error}")
    except Exception as error:
        hosts.ends_with(1)
        if said := storage.said(error):
            sys.exit(f"error: {_whose()}{said}")
        if _whose() and isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            sys.exit(
                f"error: {_whose()}another process is gone, or cannot be reached ({str(error).splitlines()[0]:.300}). "
                "Start the same command on all hosts: it goes on with what is saved."
            )
        if whose := _whose():  # before the others' words of it
            print(f"error: {whose}{type(error).__name__}: {error!s:.500}\nAll will end.", file=sys.stderr, flush=True)
        raise


def _whose() -> str:
    """Of several processes, which this is."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return f"process {jax.process_index()} of {jax.process_count()}: " if several else ""
