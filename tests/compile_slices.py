"""Compiles a small train step for two slices of TPUs that are not here: `python -m tests.compile_slices FILE`.

A program of its own, since libtpu reads the environment when it is loaded. The compiled text goes to FILE; what goes
from slice to slice by the formula, in bytes of a chip and a step, is printed.
"""

import pathlib
import sys

from experiments import ahead_of_time, chips
from grpo_jax.models.lora import LoraConfig
from grpo_jax.models.transformer import TransformerConfig
from grpo_jax.optimizers import OptimizerConfig
from grpo_jax.sharding import MeshConfig, between_slices

WIDTH, MLP_WIDTH, MICROBATCHES = 1024, 2048, 2  # a device's part of the width is of whole tiles


def main(file):
    chips.absent()
    model = TransformerConfig(
        vocab_size=512, layers=2, width=WIDTH, heads=2, kv_heads=2, head_width=128, mlp_width=MLP_WIDTH,
        compute_dtype="bfloat16", remat="full",
    )  # fmt: skip
    config = {
        "rollout": ahead_of_time.RolloutConfig(prompts=8, group_size=4, max_prompt_tokens=128, max_tokens=128),
        "lora": LoraConfig(), "loss": ahead_of_time.LossConfig(kl_coef=0.0), "optimizer": OptimizerConfig(),
        "update": ahead_of_time.UpdateConfig(microbatches=MICROBATCHES), "mesh": MeshConfig(data=2, fsdp=4),
    }  # fmt: skip
    planned = ahead_of_time.Planned(model, config, chips.devices_of("v5e:2x2", slices=2), memory=None)
    assert between_slices(planned.mesh) == ("data",)
    pathlib.Path(file).write_text(planned.train().as_text())
    print(sum(planned.work()["update"].network.values()))


if __name__ == "__main__":
    main(sys.argv[1])
