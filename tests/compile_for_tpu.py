"""Compiles what a Qwen2.5 0.5B needs, for TPUs that are not here: `python -m tests.compile_for_tpu v5e:4x4 DIRECTORY`.

A program of its own, since libtpu reads the environment when it is loaded. For each compiled program it writes the text
to DIRECTORY/NAME.txt, and prints a line of JSON: its name, the seconds it took and the bytes it needs a chip.
"""

import json
import pathlib
import sys

from experiments import ahead_of_time, chips, tasks
from grpo_jax.models.lora import LoraConfig
from grpo_jax.optimizers import OptimizerConfig
from grpo_jax.sharding import MeshConfig

PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 128, 256, 512  # of a step on GSM8K, in groups of 8
SLOTS = 256  # of a device, where completions pass through them
# (mesh, program, how attention is computed, microbatches, slots)
PROGRAMS = {
    "v5e:4x4": [
        (MeshConfig(fsdp=16), "train", "splash", 32, 0),
        (MeshConfig(data=4, fsdp=2, tensor=2), "train", "xla", 64, 0),
        (MeshConfig(fsdp=16), "sampler", "xla", 1, 0),
    ],
    "v6e:2x2": [
        (MeshConfig(fsdp=4), "train", "xla", 64, 0),
        (MeshConfig(fsdp=4), "sampler", "xla", 1, SLOTS),
    ],
}


def main(topology, directory):
    chips.absent()
    devices = chips.devices_of(topology)
    for mesh, program, attention, microbatches, slots in PROGRAMS[topology]:
        rollout = ahead_of_time.RolloutConfig(
            prompts=PROMPTS, max_prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS, slots=slots
        )
        config = {
            "lora": LoraConfig(), "rollout": rollout, "loss": ahead_of_time.LossConfig(kl_coef=0.04),
            "update": ahead_of_time.UpdateConfig(microbatches=microbatches), "optimizer": OptimizerConfig(),
            "mesh": mesh,
        }  # fmt: skip
        model = ahead_of_time.model_of("qwen2.5-0.5b", tasks.ModelConfig(attention=attention))
        planned = ahead_of_time.Planned(model, config, devices, memory=None)
        for kind, said, compiled in ahead_of_time.compiled(planned, (program,)):
            name = f"{kind} data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}"
            pathlib.Path(directory, f"{name}.txt").write_text(compiled.as_text())
            print(json.dumps({"name": name, **said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
