"""Every flag of `experiments.rlhf` changes something: prints the fields that do not, as JSON.

A process of its own, for two experiments define the same flags: python -m tests.flags_of_rlhf DIRECTORY
"""

import dataclasses
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
from absl import flags

from experiments import phases, rlhf, rlhf_run, runs
from grpo_jax import reward_model

OTHER = {
    "model": {"layers": 1, "width": 32},
    "warm_start": {"steps": 3, "batch": 4, "learning_rate": 0.1},
    "preferences": {"pairs": 6, "held_out": 3, "noise": 100.0, "replay": 0.5},
    "reward_model": {"steps": 3, "batch": 4, "learning_rate": 0.1, "center_coef": 0.5},
    "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 3, "temperature": 0.5, "top_k": 1, "top_p": 0.01,
                "min_p": 1.0, "slots": 1, "stop": ("!",)},
    "loss": {"objective": "gspo", "kl_coef": 1.0, "kl": "k2", "weighted_kl": True, "kl_in_reward": True,
             "clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.01, "clamp": 0.01, "entropy_coef": 0.1,
             "mdpo_coef": 0.5, "top_entropy": 0.5, "correction": "token_truncate", "correction_bound": 1.01},
    "optimizer": {"learning_rate": 0.5, "warmup_steps": 0, "decay": "cosine", "clip_norm": 0.0, "b1": 0.5, "b2": 0.5,
                  "epsilon": 1.0, "weight_decay": 0.1, "kind": "adafactor", "max_skipped": 2, "offload": True},
    "update": {"epochs": 2, "minibatches": 2, "microbatches": 2, "reference_every": 2, "reference_mix": 0.5},
    "train": {"steps": 7},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "checkpoints": {"every": 1, "keep_latest": 1, "keep_best": 0},
}  # fmt: skip
# What a field needs beside it to be one of this configuration.
BESIDE = {("loss", "mdpo_coef"): {"objective": "mdpo"}, ("loss", "correction_bound"): {"correction": "token_truncate"},
          ("update", "reference_mix"): {"reference_every": 3}}  # fmt: skip
ROW = {"eval/accuracy": 1.0, "rewards/rule/mean": 1.0, "step": 1}


def observe(place: pathlib.Path, section: str = "", **changes) -> str:
    """What every phase of two iterations would be made of, in words; nothing is trained or sampled."""
    config = {name: cls(**(changes if name == section else {})) for name, cls in rlhf.SECTIONS.items()}
    said, texts = [], []

    def phase(params, **options):
        experience = options["experience"]
        source = getattr(experience, "source", None)
        said.append([
            options["title"], options["model"], options["steps"], options["optimizer"], options["update"],
            options["checkpoints"], dict(options["mesh"].shape), getattr(experience, "batch", None),
            [source(i) for i in range(8)] if source else experience.__closure__[0].cell_contents,
            _losses(options["objective"]), options["objective"].reward_kl_coef, options["objective"].top_entropy,
            len(getattr(options.get("evaluator"), "_pairs", ())), f"nans {options['debug_nans']}",
        ])  # fmt: skip
        if options["title"] == "reward model":
            options["make_step"](None)
        return types.SimpleNamespace(params=params()), [ROW, ROW]

    def sampled(experiment, params, split, groups):
        for i in range(groups):
            group = [[2, 10] * (j + 1) for j in range(experiment.sampler.group_size)]
            yield "abc>", group, [f"a{'!' * (j + i % 3)}" for j in range(len(group))]

    def pair_step(policy, optimizer, loss, **_):
        said.append(float(loss(jnp.array([1.0]), jnp.array([2.0]), jnp.zeros(1))[0]))

    phases.phase, rlhf_run.Experiment.texts, reward_model.make_pair_step = phase, sampled, pair_step
    runs.check_offload = lambda optimizer, mesh: None  # which a CPU has not
    experiment = rlhf_run.Experiment(config, 0, debug_nans=section == "debug_nans")
    measured = rlhf_run.Experiment._measured
    rlhf_run.Experiment._measured = lambda self, experience, start: (lambda kept: lambda: kept)(
        [experience.config, experience.objective.needs_reference]
    )
    experiment.run(place, 2)
    rlhf_run.Experiment._measured = measured
    del texts
    return repr([said, experiment.sampler.max_tokens])


def _losses(objective) -> list[float]:
    new, old, ref = (jax.random.normal(jax.random.key(i), (4, 5)) / 10 for i in range(3))
    mask, signs, entropies = jnp.ones((4, 5), bool), jnp.array([1.0, -1.0, 2.0, -2.0]), jnp.abs(ref)
    weights, _ = objective.correction(old, ref, mask)
    loss, metrics = objective.loss(
        new, signs, mask, weights=objective.token_weights(mask), entropies=entropies, old_logprobs=old,
        ref_logprobs=ref, correction=weights if objective.corrects else None,
    )  # fmt: skip
    return [float(loss), *(float(metric.value()) for metric in metrics.values())]


def main() -> None:
    place, idle, base = pathlib.Path(sys.argv[1]), [], {}
    for section, fields in OTHER.items():
        for field, value in fields.items():
            beside = BESIDE.get((section, field), {})
            key = (section, *beside) if beside else ""
            if key not in base:
                base[key] = observe(place / f"base{len(base)}", section if beside else "", **beside)
            if observe(place / f"{section}.{field}", section, **{**beside, field: value}) == base[key]:
                idle.append(f"{section}.{field}")
    assert observe(place / "again") == base[""]  # and nothing else changes anything
    assert observe(place / "nans", "debug_nans") == base[""].replace("nans False", "nans True")  # in every phase
    skipping = observe(place / "skipping", "optimizer", max_skipped=7)
    assert skipping == base[""].replace("max_skipped=5", "max_skipped=7")  # in every phase
    covered = {f"{section}.{field}" for section in OTHER for field in OTHER[section]}
    there = {
        f"{name}.{field.name}" for name, cls in rlhf.SECTIONS.items() for field in dataclasses.fields(cls)
        if field.name not in rlhf.SKIPPED.get(name, ())
    }  # fmt: skip
    unexplained = [name for name in there if len(flags.FLAGS[name].help) < 6]
    print(json.dumps({"idle": idle, "not covered": sorted(there ^ covered), "unexplained": unexplained}))


main()
