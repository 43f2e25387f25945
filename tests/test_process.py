import os
import pathlib
import re
import signal
import subprocess
import sys
from importlib import metadata

import jax
import pytest

from experiments import process
from tests import processes
from tests.test_resume import TINY

ROOT, JAXLIB = pathlib.Path(__file__).parent.parent, metadata.version("jaxlib")


@pytest.fixture
def cache():
    """What JAX is told, which is put back afterwards."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_enable_xla_caches")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: tuple(getattr(jax.config, name) for name in names[:2])
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_compilations_are_kept_on_accelerators(cache, platform, tmp_path):
    user = f"{tmp_path}/.cache/grpo_jax/xla"
    assert process.cache_compilations("auto", platform, {"HOME": str(tmp_path)}) == f"compilation cache: {user}"
    assert cache() == (True, user)
    assert pathlib.Path(user).is_dir()
    assert not any(pathlib.Path(user).iterdir())
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0
    elsewhere = {"XDG_CACHE_HOME": f"{tmp_path}/xdg"}
    assert process.cache_compilations("auto", platform, elsewhere).endswith(f"{tmp_path}/xdg/grpo_jax/xla")


def test_compilations_are_not_kept_on_cpus_unless_asked_for(cache, tmp_path):
    said = process.cache_compilations("auto", "cpu", {"HOME": str(tmp_path)})
    assert said == "compilation cache: off, by default on CPUs; --compilation_cache=DIR switches it on"
    assert not cache()[0]
    assert not any(tmp_path.iterdir())
    assert process.cache_compilations(f"{tmp_path}/mine", "cpu", {}) == f"compilation cache: {tmp_path}/mine"
    assert cache() == (True, f"{tmp_path}/mine")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_environment_goes_before_the_default_and_flags_before_the_environment(cache, tmp_path, platform):
    environ = {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/there", "HOME": str(tmp_path)}
    assert process.cache_compilations("auto", platform, environ) == f"compilation cache: {tmp_path}/there"
    assert process.cache_compilations(f"{tmp_path}/flag", platform, environ) == f"compilation cache: {tmp_path}/flag"
    assert process.cache_compilations("off", platform, environ) == "compilation cache: off"
    assert not cache()[0]
    assert process.cache_compilations("gs://bucket/cache", platform, environ) == "compilation cache: gs://bucket/cache"


def test_a_cache_that_cannot_be_written(cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"the compilation cache .*/file/x cannot be written: .* Name another, or off\."
    ):
        process.cache_compilations(f"{tmp_path}/file/x", "gpu", {})
    nobody_asked_for = {"XDG_CACHE_HOME": f"{tmp_path}/file"}
    said = process.cache_compilations("auto", "gpu", nobody_asked_for)
    assert said.startswith(f"compilation cache: off, for {tmp_path}/file/grpo_jax/xla cannot be written (")
    assert not cache()[0]
    with pytest.raises(ValueError, match=r"--compilation_cache= must be auto, off or a directory"):
        process.cache_compilations("", "gpu", {})


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_what_is_said_of_deterministic_kernels(cache, monkeypatch, tmp_path, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    environ, place = {"XLA_FLAGS": "--theirs=1"}, f"{tmp_path}/xla/jaxlib-{JAXLIB}"
    process.make_deterministic(tmp_path, environ)
    said = process.said_of_deterministic(tmp_path)
    if platform == "gpu":
        assert said == "deterministic kernels, the same in every process"
    else:
        assert said == f"--deterministic changes nothing on a {platform}, where runs repeat anyway"
    assert environ["XLA_FLAGS"].split() == [
        "--theirs=1",
        "--xla_gpu_exclude_nondeterministic_ops=true",
        f'--xla_gpu_per_fusion_autotune_cache_dir="{place}"',
    ]
    assert jax.config.values["jax_persistent_cache_enable_xla_caches"] == "none"
    assert not any(tmp_path.iterdir())


def test_the_compiler_knows_before_it_starts_and_a_run_goes_on_with_the_same_kernels_alone(tmp_path):
    """XLA says itself which options it compiles with."""
    flags = [f"--workdir={tmp_path / 'a run'}", "--warm_start_only", *TINY]
    dump = "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step"
    done = processes.python(
        "-m", "experiments.countdown", "--deterministic", *flags, XLA_FLAGS=f"{dump} --xla_dump_to={tmp_path / 'dump'}"
    )  # fmt: skip
    assert "--deterministic changes nothing on a cpu, where runs repeat anyway\n" in done.stdout
    (options,) = (tmp_path / "dump").glob("*.debug_options")
    said = options.read_text()
    assert "xla_gpu_exclude_nondeterministic_ops: true\n" in said
    assert f'xla_gpu_per_fusion_autotune_cache_dir: "{tmp_path}/a run/xla/jaxlib-{JAXLIB}"\n' in said
    refused = processes.python("-m", "experiments.countdown", *flags, status=1)
    assert "another configuration:\n  deterministic: there True, now 'absent'\n" in refused.stderr


@pytest.mark.parametrize("experiment", ["gsm8k", "sft"])
def test_other_experiments_have_it_too(tmp_path, experiment):
    flags = [f"--model={tmp_path / 'none'}", f"--workdir={tmp_path / 'run'}", "--deterministic"]
    refused = processes.python("-m", f"experiments.{experiment}", *flags, status=1)
    assert "--deterministic changes nothing on a cpu" in refused.stdout
    assert str(tmp_path / "none") in refused.stderr
    assert not (tmp_path / "run").exists()


PROGRAM = """
import collections, sys
import jax
from experiments import process
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
process.cache_compilations(sys.argv[1])
assert jax.jit(lambda x: x * 2 + 1)(3) == 7
print(counts["/jax/compilation_cache/cache_hits"], counts["/jax/compilation_cache/cache_misses"])
"""


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=64"}, "256"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count='8'"}, "32"),
        ({"JAX_NUM_CPU_DEVICES": "8"}, "32"),
        ({"JAX_NUM_CPU_DEVICES": "-1"}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PJRT_NPROC": "9"}, "9"),
    ],
)
def test_devices_that_a_cpu_is_made_to_be_have_threads(monkeypatch, given, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    environ = dict(given)
    process.enough_threads(environ)
    assert environ.get("PJRT_NPROC") == threads


UPDATES = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from experiments import process

@jax.jit
def updated(w, x):
    step = lambda _, w: w - 1e-3 * jax.grad(lambda w: jnp.sin(x @ w).mean())(w)
    return jax.lax.fori_loop(0, 4, step, w)

def main(argv):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    w, x = put(jnp.ones((256, 256))), put(jnp.ones((64, 256)), "data")
    for _ in range(300):  # the next are handed over while one still runs
        w = updated(w, x)
    print(jax.block_until_ready(w).shape)

process.command(main)
"""


def test_with_as_many_as_experiments_ask_for_no_device_waits_for_another():
    """With eight, one each, nearly every such run ends in an error of XLA's after a long silence."""
    environ = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    del environ["PJRT_NPROC"]  # of conftest
    done = subprocess.run(
        [sys.executable, "-c", UPDATES], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "(256, 256)\n"), done.stderr[-3000:]


INTERRUPTED = """
import gc, os, signal, time
from experiments import process

def _xla_gc_callback(phase, info):  # as JAX calls its own; what is raised here is ignored
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100_000):  # Python's handler runs somewhere here
        pass

def main(argv):
    gc.callbacks[:] = [_xla_gc_callback]
    gc.collect()
    time.sleep(10)
    print("went on")

process.command(main)
"""


def test_ctrl_c_is_one_line_and_not_lost_where_jax_is_called_by_the_garbage_collector():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == ""
    assert done.stderr == "interrupted; the same command goes on with what is saved\n"
    assert done.returncode == 128 + signal.SIGINT


def test_ctrl_c_while_it_imports_ends_it(tmp_path):
    """By the signal itself: libraries take Python's exception for an error of theirs, and the run goes on."""
    with processes.begin("-m", "experiments.countdown", f"--workdir={tmp_path / 'run'}") as run:
        maps = pathlib.Path(f"/proc/{run.pid}/maps")
        while "jaxlib" not in maps.read_text():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=300)
    assert (run.returncode, said) == (-signal.SIGINT, ("", ""))


@pytest.mark.parametrize(("path", "said"), [(".", "--json={} is a directory"), ("no/x", "--json={}: there is no dir")])
def test_a_file_that_cannot_be_written(tmp_path, path, said):
    process.check_file("json", "")
    process.check_file("json", f"{tmp_path}/x.json")
    with pytest.raises(ValueError, match=re.escape(said.format(f"{tmp_path}/{path}"))):
        process.check_file("json", f"{tmp_path}/{path}")


def test_the_next_process_finds_what_this_one_compiled(tmp_path):
    def hits_and_misses(asked):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, asked], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return tuple(map(int, done.stdout.split()))

    hits, misses = hits_and_misses(str(tmp_path))
    assert hits == 0
    assert misses > 0
    assert hits_and_misses(str(tmp_path)) == (misses, 0)
    assert hits_and_misses("auto") == (0, 0)
