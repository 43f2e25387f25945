"""The process that an experiment is: its devices, its compiler's flags and cache, its memory, and how it ends."""

import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from importlib import metadata
from types import FrameType

import jax
from absl import app

from experiments.flags import parsed
from grpo_jax import hosts, sharding, storage
from grpo_jax.guard import NotFiniteError
from grpo_jax.models import pretrained
from grpo_jax.rewards import RewardError
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError

__all__ = [
    "cache_compilations",
    "check_file",
    "command",
    "devices",
    "enough_threads",
    "interruptible",
    "join_hosts",
    "make_deterministic",
    "no_arguments",
    "peak_rss",
    "resident",
    "said_of_deterministic",
    "version",
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
    place = directory / "xla" / f"jaxlib-{version('jaxlib')}"  # what one version chose is not for another
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


def check_file(name: str, value: str) -> None:
    """Raises ValueError where a file that a flag names cannot be written; empty: there is none to write."""
    path = pathlib.Path(value).absolute()
    if value and not path.parent.is_dir():
        raise ValueError(f"--{name}={value}: there is no directory {path.parent}.")
    if value and path.is_dir():
        raise ValueError(f"--{name}={value} is a directory: name a file.")


def no_arguments(argv: list[str]) -> None:
    """Ends with a line where there is more than flags on the command line."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; flags are written --name=value.")


def version(package: str) -> str:
    """That is installed of a package, in words."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


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
        app.run(main, flags_parser=parsed)
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
