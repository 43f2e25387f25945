import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from grpo_jax import sharding
from tests import processes

READ = """
import sys, pathlib, jax, numpy as np
from tests.ends import last_state
assert jax.device_count() == 1
state = last_state(pathlib.Path(sys.argv[1]))
print({name: (str(x.dtype), np.float32(x).tolist()) for name, x in state.items()})
"""


def test_the_last_state_is_read_whatever_the_devices_were(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    split = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
    state = {"w": split, "count": jnp.int32(3), "half": jax.device_put(jnp.ones(2, jnp.bfloat16), jax.devices()[5])}
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save_checkpointables(1, {"state": state})
    done = processes.python("-c", READ, str(tmp_path))
    expected = {f"['{name}']": (str(x.dtype), np.float32(x).tolist()) for name, x in sorted(state.items())}
    assert done.stdout == f"{expected}\n"
