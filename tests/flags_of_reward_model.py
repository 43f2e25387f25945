"""Every flag of `experiments.reward_model` changes something: prints the fields that do not, as JSON.

A process of its own, for two experiments define the same flags: python -m tests.flags_of_reward_model MODEL DIRECTORY
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import flags

from experiments import phases, reward_model, runs
from grpo_jax.data import sources

OTHER = {
    "policy": {"compute_dtype": "float32", "attention": "splash", "remat": "none"},
    "data": {"train_file": "DIR/other.jsonl", "test_file": "DIR/other.jsonl", "template": "qa", "system": "Be brief.",
             "max_tokens": "12"},
    "tfds": {"dataset": "other", "train_split": "train[:2]", "test_split": "test[:1]", "directory": "elsewhere"},
    "reward": {"center_coef": "0.5", "margins": "False"},
    "optimizer": {"learning_rate": "0.5", "warmup_steps": "0", "decay": "linear", "clip_norm": "0", "b1": "0.5",
                  "b2": "0.5", "epsilon": "1", "weight_decay": "0.1", "kind": "adafactor", "offload": "True",
                  "max_skipped": "2"},
    "train": {"steps": "7", "batch": "2", "seed": "1"},
    "mesh": {"data": "2", "fsdp": "2", "tensor": "2"},
    "evaluation": {"every": "3", "pairs": "2", "bins": "3"},
    "checkpoints": {"every": "1", "keep_latest": "1", "keep_best": "0"},
}  # fmt: skip


def pairs(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "chosen": "5" * (i + 1), "rejected": "6", "margin": i + 1} for i in range(count)]


class Phase(Exception):
    """What a run would do, had it begun."""


def observe(given: dict[str, str], workdir: pathlib.Path) -> str:
    """All that a run is made of, in words."""
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["", *(f"--{name}={value}" for name, value in given.items()), f"--workdir={workdir}"])

    def phase(params, **options):
        raise Phase(options)

    phases.phase, runs.check_attention = phase, lambda config: None
    runs.check_offload = lambda optimizer, mesh: None  # which a CPU has not
    try:
        reward_model.main([""])
    except Phase as begun:
        (options,) = begun.args
    experience, evaluator, policy = options["experience"], options["evaluator"], options["policy"]
    batch = experience(dataclasses.make_dataclass("State", ["cursor"])(0), None, None).batch
    losses, ids = [], jax.ShapeDtypeStruct((2, 4), jnp.int32)
    reward_model.reward_model.make_pair_step = lambda policy, optimizer, loss, **_: losses.append(loss)
    options["make_step"](None)
    loss, _ = losses[0](jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0]), jnp.ones(2))
    shapes = reward_model.abstract_params(options["model"])[0]
    said = [
        options["model"], batch.tokens.tolist(), batch.margins.tolist(), evaluator._pairs, evaluator._bins, float(loss),
        options["steps"], options["evaluate_every"], options["optimizer"], options["checkpoints"],
        dict(options["mesh"].shape), options["debug_nans"],
    ]  # fmt: skip
    if options["model"].attention == "xla" and options["mesh"].size == 1:
        said.append(jax.jit(policy.hidden).lower(shapes, ids, ids, ids).as_text())
    return repr(said)


def main() -> None:
    model, place = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    for name, count in (("train", 6), ("test", 3), ("other", 5)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(name, count)))
    sources.tfds_records = lambda *asked: pairs(repr(asked), 5)
    base = {"model": str(model), "train.batch": "4", "data.max_tokens": "64"}
    files = {"data.train_file": f"{place}/train.jsonl", "data.test_file": f"{place}/test.jsonl"}
    stored = {"data.dataset": "some", "optimizer.decay": "cosine"}
    chat = {"data.template": "chat"}
    said = {name: observe(given, place / name) for name, given in
            {"files": base | files, "stored": base | stored, "chat": base | files | chat}.items()}  # fmt: skip
    assert observe(base | files, place / "again") == said["files"]  # and nothing else does
    idle = []
    if observe(base | files | {"debug_nans": "True"}, place / "nans") == said["files"]:
        idle.append("debug_nans")
    for section, fields in OTHER.items():
        for field, value in fields.items():
            kind = "stored" if section == "tfds" else "chat" if field == "system" else "files"
            given = base | {"stored": stored, "chat": files | chat, "files": files}[kind]
            name = f"{'data' if section == 'tfds' else section}.{field}"
            given = given | {name: value.replace("DIR", str(place))}
            if observe(given, place / name) == said[kind]:
                idle.append(name)
    covered = {f"{'data' if section == 'tfds' else section}.{field}" for section in OTHER for field in OTHER[section]}
    there = {f"{name}.{field.name}" for name, cls in reward_model.SECTIONS.items() for field in dataclasses.fields(cls)}
    unexplained = [name for name in there if len(flags.FLAGS[name].help) < 6]
    print(json.dumps({"idle": idle, "not covered": sorted(there ^ covered), "unexplained": unexplained}))


main()
