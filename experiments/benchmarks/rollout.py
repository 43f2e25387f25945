"""Sampling beside transformers' generate, and tunix' sampler where it is installed: the same weights, prompts, lengths.

python -m experiments.benchmarks.rollout [--size=5m] [--tokens=512 --lengths=geometric] [--peers=transformers,tunix]
[--profile=DIR]

Tokens a second are of completions, their padding left out. The mismatch is what `--sampler_dtype=bfloat16` or `int8`
costs: how far the sampler's log-probabilities are from the trainer's, of all tokens. Needs `.[parity]`; tunix is
`pip install google-tunix`.
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import measure
from experiments.benchmarks.profiles import Profiled, profiled
from experiments.benchmarks.workload import Ours, Workload

PEERS = ("transformers", "tunix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Profiled):
    """The workload, and who else does it."""

    peers: tuple[str, ...] = PEERS  # whom ours is compared with; one that is not installed is left out and named

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted({*self.peers} - {*PEERS}):
            raise ValueError(f"peers={unknown} must be among {', '.join(PEERS)}.")


def timed(workload: Workload, side: str, generate: Callable[[], np.ndarray]) -> Callable[[], dict[str, float]]:
    """A side of `measure.turns` out of what makes completions of lengths [B]."""

    def run() -> dict[str, float]:
        seconds, lengths = measure.seconds(generate)
        workload.check(lengths, side)
        return {"seconds": seconds, "tokens_per_second": float(lengths.sum()) / seconds}

    return run


def run(options: Options) -> dict[str, Any]:
    """Measures all sides in turns."""
    measure.need("torch", "transformers", "trl")
    from experiments.benchmarks import peers

    left_out = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        peers.write_checkpoint(directory, options.model, options.seed)
        ours = Ours(options, directory)
        sample = ours.rollout()
        sides = {"ours": timed(options, "ours", lambda: sample().mask.sum(axis=1))}
        if "transformers" in options.peers:
            sides["transformers"] = timed(options, "transformers", peers.rollout(options, directory))
        if "tunix" in options.peers:
            if importlib.util.find_spec("tunix") is None:
                left_out.append("tunix is left out: it is not installed (pip install google-tunix).")
            elif options.lengths != "full":
                left_out.append("tunix is left out: its loop has no place for lengths that are given.")
            else:
                sides["tunix"] = timed(options, "tunix", peers.tunix_rollout(options, directory))
        measured = measure.turns(sides, options.rounds)
        tables, mismatch = profiled(options, sample), ours.mismatch(sample())
    said = "ours: log-probabilities of sampler and trainer differ by {mean:.2g}, at most {max:.2g}".format(**mismatch)
    return measure.report(
        "experiments.benchmarks.rollout", options, measured, tables=tables, notes=[*left_out, said],
        lengths=options.limits.tolist(), mismatch=mismatch,
    )  # fmt: skip


if __name__ == "__main__":
    measure.command(Options, run)
