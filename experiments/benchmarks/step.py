"""A whole GRPO step beside TRL's GRPOTrainer: the same random checkpoint, prompts, lengths, reward; KL to a reference.

python -m experiments.benchmarks.step [--size=5m] [--tokens=512 --lengths=geometric] [--peer_microbatches=1]
[--profile=DIR]

Both: one dtype, temperature 1, one update of AdamW a step, gradients clipped to norm 1, beta 0.04. Needs `.[parity]`.
"""

import pathlib
import tempfile
from typing import Any

from experiments.benchmarks import measure
from experiments.benchmarks.profiles import Profiled, profiled
from experiments.benchmarks.workload import Ours


def run(options: Profiled) -> dict[str, Any]:
    """Measures both in turns. An update holds all that is not generation (of ours: nor rewards), the reference too."""
    measure.need("torch", "transformers", "trl")
    from experiments.benchmarks import peers

    with tempfile.TemporaryDirectory() as scratch:
        directory, workdir = pathlib.Path(scratch) / "model", pathlib.Path(scratch)
        peers.write_checkpoint(directory, options.model, options.seed)
        trl = peers.TrlSteps(options, directory, workdir / "trl", microbatches=options.peer_microbatches)
        ours = Ours(options, directory).step(workdir)
        measured = measure.turns({"ours": ours, "trl": trl}, options.rounds)
        trl.close()
        tables = profiled(options, ours)
    return measure.report(
        "experiments.benchmarks.step", options, measured, tables=tables, lengths=options.limits.tolist()
    )


if __name__ == "__main__":
    measure.command(Profiled, run)
