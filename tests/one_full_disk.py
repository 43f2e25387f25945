"""Two processes save a checkpoint, and the disk of one of them is full: what each hears. For `test_hosts`."""

import resource
import sys

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import hosts, sharding, storage
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.telemetry import WorkdirError
from grpo_jax.types import TrainState

PATIENCE = 5  # seconds


def main(distributed: str, directory: str, which: int) -> None:
    """Says what saving comes to; process `which` has the full disk."""
    hosts.initialize(distributed)
    import jax

    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=jax.device_count()))
    split, everywhere = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    w = np.random.default_rng(0).normal(size=(jax.device_count(), 2**16)).astype(np.float32)  # does not compress
    number = lambda n: hosts.put(np.int32(n), everywhere)
    state = TrainState(
        params={"w": hosts.put(w, split)}, reference=None, opt_state=(), step=number(1), cursor=number(0)
    )
    store = Checkpoints(storage.path(directory))
    if jax.process_index() == which:  # stands in for the disk: no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        store.save(state, patience=PATIENCE)
        store.wait()
    except WorkdirError as error:
        print(f"HEARD {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
