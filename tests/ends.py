"""How a run has ended: its logs, and its last state."""

import json
import pathlib

import numpy as np

__all__ = ["last_state", "untimed"]


def untimed(path: pathlib.Path) -> list[dict]:
    """The lines of a log, without times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def last_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by name: parameters, reference, optimizer state, step, cursor.

    Whatever the devices were that saved it.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer((workdir / "checkpoints").absolute()) as checkpointer:
        described = checkpointer.checkpointables_metadata(None).metadata["state"]
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), described)
        state = checkpointer.load_checkpointables(None, {"state": like})["state"]
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
