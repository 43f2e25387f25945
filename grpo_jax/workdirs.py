"""Whose a workdir is: one run's, of one configuration, which `config.json` holds, and of one process at a time."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from grpo_jax import hosts, storage
from grpo_jax.locks import lock
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError, write_atomically

__all__ = ["open_workdir"]

_LOG = logging.getLogger(__name__)

# What changes nothing but roundings, what is kept, or when a run gives up; and what files hold that a user may have to
# mend, which is said.
_FREE = ("mesh", "checkpoints", "rollout.slots", "rewards.digests", "optimizer.max_skipped")


def open_workdir(workdir: Path, configuration: Mapping[str, Any], free: tuple[str, ...] = _FREE) -> None:
    """Makes the workdir and writes `config.json`, or checks that the one there is the same.

    From here on the workdir is this process's, of several the first's, until it ends.

    Args:
      workdir: the directory.
      configuration: sections of plain values.
      free: sections, and fields by section.field, that may change between restarts.

    Raises:
      WorkdirError: it cannot be written, another process has it, or it belongs to another configuration; the fields
        are named.
    """
    _check_same(configuration)
    hosts.first_does(lambda: _open_workdir(workdir, configuration, free), kind=WorkdirError)
    hosts.together(lambda: _check_shared(workdir, configuration), kind=WorkdirError)


def _as_text(configuration: Mapping[str, Any]) -> str:
    return json.dumps(configuration, indent=2, sort_keys=True) + "\n"


def _check_same(configuration: Mapping[str, Any]) -> None:
    """Raises WorkdirError where one process was given other flags than the first."""
    first, *others = hosts.gathered(configuration)
    for process, other in enumerate(others, 1):
        if differ := _differences(first, other, (), ("process 0 has", f"process {process} has")):
            raise WorkdirError("processes of one run must be given the same flags:\n  " + "\n  ".join(differ))


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], free: tuple[str, ...], names: tuple[str, str]
) -> list[str]:
    """Fields that are not the same, ten at most, as `name: there 1, now 2` with these names of the two."""
    one, other = _flat(ours), _flat(theirs)
    differ = [
        f"{name}: {names[0]} {one.get(name, 'absent')!r}, {names[1]} {other.get(name, 'absent')!r}"
        for name in sorted({**one, **other})
        if one.get(name) != other.get(name) and not {name, name.split(".")[0]} & {*free}
    ]
    return differ[:10] + ([f"and {len(differ) - 10} more"] if len(differ) > 10 else [])


def _check_shared(workdir: Path, configuration: Mapping[str, Any]) -> None:
    """Raises WorkdirError unless this process sees what the first wrote; a network's file system may take a while."""
    path, until = workdir / "config.json", time.monotonic() + 60
    while not (path.exists() and path.read_text() == _as_text(configuration)):
        if time.monotonic() > until:
            raise WorkdirError(
                f"{path}, which process 0 has written, is not what process {jax.process_index()} finds there: "
                "--workdir must be the same, on a file system that all hosts share."
            )
        time.sleep(0.5)


_OF_A_START = (".lock", "config.json", "model", "xla")
# What a run writes over, or goes on from; config.json is there before.
_OF_A_RUN = {
    "adapter", "checkpoints", "export", "metrics.jsonl", "model", "rewards.jsonl", "samples.jsonl", "summary.json",
}  # fmt: skip


_OF_ANOTHER_EXPERIMENT = 3  # sections that one configuration has and another has not


def _open_workdir(workdir: Path, configuration: Mapping[str, Any], free: tuple[str, ...]) -> None:
    path, text = workdir / "config.json", _as_text(configuration)
    try:
        storage.make_directory(workdir)
        storage.probe(workdir)
    except OSError as error:
        raise WorkdirError(f"cannot write to workdir {workdir}: {error}. Choose another --workdir.") from error
    lock(workdir)
    try:
        if (workdir / "checkpoints").exists():  # which may be on another disk, or another user's
            storage.probe(workdir / "checkpoints")
    except OSError as error:
        raise WorkdirError(f"cannot write checkpoints to workdir {workdir}: {error}. Mend this first.") from error
    names = {item.name for item in workdir.iterdir()}
    if path.name not in names and (others := sorted(names & _OF_A_RUN)):
        raise WorkdirError(
            f"workdir {workdir} has {', '.join(others)} and no config.json, with which every run begins: what is there "
            "is of no run that could go on, and would be written over. Choose another --workdir, or move it away."
        )
    # What a start that failed has left binds nobody.
    nothing = lambda name: name in _OF_A_START or name.startswith(".writable-") or name.endswith(".part")
    beside = sorted(name for name in names if not nothing(name))
    if beside and path.name not in names:
        _LOG.warning("workdir %s is no run's and holds %s: the run's files will lie beside that.", workdir, beside[:5])
    belongs = path.name in names and bool(beside)
    theirs = _read(path) if belongs else json.loads(text)
    sections = lambda configuration: {name for name, value in configuration.items() if isinstance(value, Mapping)}
    apart = sorted((sections(theirs) ^ sections(configuration)) - {*free})
    if len(apart) >= _OF_ANOTHER_EXPERIMENT:
        raise WorkdirError(
            f"workdir {workdir} is of another experiment: of it and this run, one alone has {', '.join(apart)}. Choose "
            "another --workdir."
        )
    if differ := _differences(theirs, json.loads(text), free, ("there", "now")):
        raise WorkdirError(
            f"workdir {workdir} belongs to a run with another configuration:\n  " + "\n  ".join(differ) + "\n"
            "Give the same flags to continue it, or another --workdir to start a new run."
        )
    write_atomically(path, text)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}): put back what the run was begun with, or choose another --workdir."
        ) from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
