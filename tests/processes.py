"""Programs of ours in processes of their own, as users run them."""

import atexit
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def _compiled() -> str:
    """Where programs find what others that this process has run have compiled: most of a small one's time.

    That is off by default on CPUs, for what was compiled on one machine may not run on another. This is one machine.
    """
    place = tempfile.mkdtemp(prefix="grpo_jax_compiled_")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def environment(devices: int | None = 1, **variables: str) -> dict[str, str]:
    """In which Python sees so many CPU devices (None: those of this process's environment), and these variables too."""
    cpus = {}
    if devices is not None:  # as in conftest
        flags = (
            "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=300 "
            f"--xla_force_host_platform_device_count={devices}"
        )
        cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": str(4 * devices)}
    return {
        **os.environ,
        **cpus,
        "JAX_COMPILATION_CACHE_DIR": _compiled(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }


def begin(*command: str, devices: int = 1) -> "subprocess.Popen[str]":
    """Starts Python on the command, at the root of the clone, on so many CPU devices; what it says can be read."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def python(
    *command: str, devices: int = 1, status: int | None = 0, timeout: float = 1200, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python on the command, at the root of the clone, and says all that it has said.

    Args:
      command: behind `python`.
      devices: CPU devices that it sees.
      status: which it must exit with; None: any.
      timeout: in seconds.
      variables: of its environment, too.
    """
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(devices, **variables), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def killed(
    experiment: str, at: str, *flags: str, kill_with: str = "SIGKILL", status: int | None = 0, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs an experiment that is killed at a moment of `tests.kill_at`, or where that is empty is not.

    Args:
      experiment: its module's name.
      at: the moment.
      flags: of the experiment.
      kill_with: the name of a signal.
      status: which it must exit with where nothing kills it; None: any.
      devices: CPU devices that it sees.
    """
    number = getattr(signal, kill_with)
    if at:
        status = -number if kill_with == "SIGKILL" else 128 + number
    variables = {"KILL_AT": at, "KILL_WITH": kill_with, "KILL_IN": experiment}
    return python("-m", "tests.kill_at", *flags, devices=devices, status=status, **variables)
