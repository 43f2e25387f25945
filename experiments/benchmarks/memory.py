"""Peak memory of a GRPO step, or of a rollout, beside the peer's: each in a process of its own, beyond its imports.

python -m experiments.benchmarks.memory [--what=step] [--size=5m] [--tokens=128] [--peer_microbatches=1] [--rounds=3]

Of each: resident bytes once the libraries are imported, once the model is there too, and at the highest. Needs
`.[parity]`.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from experiments import process
from experiments.benchmarks import measure
from experiments.benchmarks.workload import Ours, Workload

MODULE = "experiments.benchmarks.memory"
PEER = {"step": "trl", "rollout": "transformers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Workload):
    """The workload, and what of it."""

    what: str = "step"  # step: beside TRL; rollout: beside transformers' generate
    repeats: int = 2  # steps, or rollouts, in each process: memory may grow after the first
    only: str = ""  # measure this side here and nothing else (ours, trl, transformers); empty: all, each in a process
    directory: str = ""  # the model, for `only`; empty: ours makes a random one
    rounds: int = 3  # processes of each side

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in PEER:
            raise ValueError(f"what={self.what!r} must be one of {', '.join(PEER)}.")
        peer = PEER[self.what]
        if self.only not in ("", "ours", peer) or (self.only == peer and not self.directory):
            raise ValueError(f"only={self.only!r} must be empty, ours, or {peer} with a directory.")


def _side(options: Options, directory: pathlib.Path | None, scratch: pathlib.Path) -> tuple[int, Callable[[], Any]]:
    """Bytes once all is imported, and what is to run, with its model loaded."""
    if options.only == "ours":
        imported, ours = measure.rss(), Ours(options, directory)
        return imported, ours.rollout() if options.what == "rollout" else ours.step(scratch)
    from experiments.benchmarks import peers

    assert directory is not None
    imported = measure.rss()
    if options.what == "rollout":
        return imported, peers.rollout(options, directory)
    return imported, peers.TrlSteps(options, directory, scratch / "out", microbatches=options.peer_microbatches)


def _alone(options: Options) -> dict[str, float]:
    """One side, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(options.directory) if options.directory else None
        imported, step = _side(options, directory, pathlib.Path(scratch))
        loaded = measure.rss()
        for _ in range(options.repeats):
            step()
        peak = process.peak_rss()
        if options.only == "trl":
            step.close()  # pyright: ignore[reportFunctionMemberAccess]
    return {
        "imported_bytes": imported, "loaded_bytes": loaded, "peak_bytes": peak,
        "peak_beyond_imports_bytes": peak - imported, "peak_beyond_model_bytes": peak - loaded,
    }  # fmt: skip


def run(options: Options) -> dict[str, Any]:
    """Both sides, or the one that is asked for."""
    measure.need_host_memory()
    if options.only:
        return _alone(options)
    measure.need("torch", "transformers", "trl")
    from experiments.benchmarks import peers

    with tempfile.TemporaryDirectory() as scratch:
        peers.write_checkpoint(pathlib.Path(scratch), options.model, options.seed)
        alone = lambda side: lambda: measure.fresh(MODULE, options, only=side, directory=scratch)
        sides = {side: alone(side) for side in ("ours", PEER[options.what])}
        measured = measure.turns(sides, options.rounds, warmup=0)
    return measure.report(MODULE, options, measured)


if __name__ == "__main__":
    measure.command(Options, run)
