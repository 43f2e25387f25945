"""Every flag changes something: for each field of each section another value, and what it changes."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import countdown, games, phases
from experiments.flags import parsed
from grpo_jax import loop, objectives, optimizers, rollouts, sharding, training
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.corrections import top_entropies
from grpo_jax.data.countdown import Countdown
from grpo_jax.data.sources import Prompt
from grpo_jax.guard import NotFiniteError
from grpo_jax.models.transformer import init_params, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.telemetry import read_jsonl
from grpo_jax.types import Rollout
from tests.silent import silent_rollout
from tests.test_rollouts import Journal

OTHER = {
    "task": {"numbers": 4, "max_number": 12, "max_target": 20, "effort": 1.0},
    "model": {"layers": 3, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32, "rope_base": 100.0,
              "norm_epsilon": 1e-3, "compute_dtype": "bfloat16", "sampler_dtype": "int8"},
    "warm_start": {"steps": 3, "batch": 4, "learning_rate": 0.1, "seed": 5},
    "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 3, "temperature": 0.5, "top_k": 1, "top_p": 0.01,
                "min_p": 1.0, "slots": 1, "stop": tuple("0123456789+-*/()= :"), "max_waves": 2},
    "advantages": {"baseline": "batch", "scale": "none", "ddof": 0, "epsilon": 1.0, "smoothing": 0.5, "discount": 0.5,
                   "normalize_each": True, "count_truncated": False, "train_truncated": False},
    "loss": {"objective": "gspo", "kl_coef": 1.0, "kl": "k2", "weighted_kl": True, "kl_in_reward": True,
             "clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.01, "clamp": 0.01, "entropy_coef": 0.1,
             "mdpo_coef": 0.5, "top_entropy": 0.5, "correction": "token_truncate", "correction_bound": 1.01},
    "optimizer": {"learning_rate": 0.5, "warmup_steps": 0, "decay": "cosine", "clip_norm": 0.0, "b1": 0.5, "b2": 0.5,
                  "epsilon": 1.0, "weight_decay": 0.1, "kind": "adafactor", "max_skipped": 2, "offload": True},
    "update": {"epochs": 2, "minibatches": 2, "microbatches": 2, "reference_every": 2, "reference_mix": 0.5},
    "train": {"steps": 7, "seed": 1, "format_reward": 0.5, "samples_every": 1},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "evaluation": {"every": 3, "prompts": 6, "sampled_prompts": 5, "samples": 3, "temperature": 2.0, "top_p": 0.5,
                   "completions": 4},
    "checkpoints": {"every": 1, "keep_latest": 1, "keep_best": 0},
}  # fmt: skip
BASE = {
    "model": {
        "vocab_size": Countdown.tokenizer.vocab_size,
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 4,
        "mlp_width": 16,
    },
    "warm_start": {"steps": 2, "batch": 8},
    "rollout": {"prompts": 2, "group_size": 2},
    "train": {"steps": 8, "samples_every": 2},
    "evaluation": {"every": 2, "prompts": 4, "sampled_prompts": 4, "samples": 2},
    "checkpoints": {"every": 2, "keep_latest": 2, "keep_best": 1},
    "optimizer": {"warmup_steps": 2, "learning_rate": 0.1, "decay": "constant"},
    "update": {"reference_every": 3},
}
FIELDS = [(section, field) for section, fields in OTHER.items() for field in fields]


def configs(section: str, **changes) -> dict:
    made = {name: {**BASE.get(name, {}), **(changes if name == section else {})} for name in countdown.SECTIONS}
    return {name: countdown.SECTIONS[name](**values) for name, values in made.items()}


def observe_task(config, tmp_path):
    task = Countdown(config["task"], 0)
    return [task.demonstration(i) for i in range(30)]


def observe_model(config, tmp_path):
    policy, params = make_policy(config["model"]), init_params(config["model"], jax.random.key(0))
    rows = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    sampler = jax.tree.map(lambda x: str(x.dtype), jax.eval_shape(policy.prepare, params))
    return jax.jit(policy.hidden).lower(params, rows, rows, rows).as_text(), jax.tree.leaves(sampler)


def observe_advantages(config, tmp_path):
    """Of objectives that between them have a place for every field, each asked for those that it has a place for."""
    without = lambda **left_out: dataclasses.replace(config["advantages"], **left_out)
    default = countdown.AdvantageConfig()
    return (
        advantages_of("grpo", without(smoothing=default.smoothing, discount=default.discount)),
        advantages_of("ppo", without(baseline=default.baseline, scale=default.scale)),
    )


def advantages_of(name, config):
    """Of two groups, with a completion that was cut: advantages, and which tokens train."""
    finished, rows = np.array([True, True, False, True, True, True]), (6, 3)

    def sampler():
        return Rollout(
            prompt_tokens=np.zeros((2, 2), np.int32), prompt_mask=np.ones((2, 2), bool),
            completion_tokens=np.full(rows, 3), mask=np.ones(rows, bool), finished=finished,
            logprobs=np.zeros(rows), sampler_logprobs=np.zeros(rows),
        )  # fmt: skip

    experience = rollouts.GroupRollouts(
        sampler=types.SimpleNamespace(
            waves=lambda *_: [sampler()], tokenizer=Countdown.tokenizer, mesh=sharding.make_mesh()
        ),
        source=lambda i: Prompt(text="1"), config=rollouts.RolloutConfig(prompts=2, group_size=3),
        rewards=[Reward(name="r", function=lambda **_: [1.0, 0.0, 0.5, 0.2, 0.9, 0.1]),
                 Reward(name="s", function=lambda **_: [0.0, 9.0, 1.0, 0.0, 0.0, 2.0])],
        advantages=config, objective=objectives.make_objective(objectives.LossConfig(objective=name)),
    )  # fmt: skip
    journal = Journal()
    batch = experience(types.SimpleNamespace(params=None, cursor=0, step=0), journal, lambda: None).batch
    return np.asarray(batch.advantages).tolist(), np.asarray(batch.mask).tolist()


def observe_loss(config, tmp_path):
    """Of the objective, and of mirror descent, which has no clip and the only use for `mdpo_coef`."""
    config = config["loss"]
    mirror = {"objective": "mdpo", "dual_clip": 0.0, "clip_low": None, "clip_high": None}
    return [loss_of(dataclasses.replace(config, **changes)) for changes in ({"mdpo_coef": 1.0}, mirror)]


def loss_of(config):
    objective = objectives.make_objective(config)
    new, old, ref = (jax.random.normal(jax.random.key(i), (4, 5)) / 10 for i in range(3))
    mask, signs, entropies = jnp.ones((4, 5), bool), jnp.array([1.0, -1.0, 2.0, -2.0]), jnp.abs(ref)
    weights, metrics = objective.correction(old, ref, mask)
    learns = top_entropies(entropies, mask, objective.top_entropy)
    loss, _ = objective.loss(
        new, signs, mask, weights=objective.token_weights(mask), entropies=entropies, old_logprobs=old,
        ref_logprobs=ref, correction=learns * (weights if objective.corrects else 1.0),
    )  # fmt: skip
    return float(loss), {name: float(metric.value()) for name, metric in metrics.items()}


def observe_optimizer(config, tmp_path):
    optimizer, schedule = optimizers.make_optimizer(config["optimizer"], 6)
    experiment = countdown.Experiment(config)
    lies = training.abstract_train_state(
        experiment.policy, fresh_params(config), optimizer, experiment.objective, experiment.mesh,
        offload=config["optimizer"].offload,
    ).opt_state  # fmt: skip
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(params * jnp.array([3.0, 0.5]), state, params)
        params = optax.apply_updates(params, updates)
    return params.tolist(), [float(schedule(i)) for i in range(6)], str(lies), gives_up_after(config, tmp_path)


def gives_up_after(config, tmp_path) -> int:
    """Steps of a run in which every optimizer step is skipped."""
    experiment = countdown.Experiment(config)

    def skipping(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {"skipped_in_a_row": state.step + np.float32(1)}

    experience = lambda *_: rollouts.Experience(batch=None, prompts_consumed=1)
    with pytest.raises(NotFiniteError):
        experiment.run(
            fresh_params(config), objective=objectives.supervised(), experience=experience, workdir=tmp_path,
            title="test", optimizer=config["optimizer"], update=config["update"], steps=9,
            make_step=lambda *_, **__: skipping,
        )  # fmt: skip
    return len(read_jsonl(tmp_path / "metrics.jsonl")) - 1


def observe_update(config, tmp_path):
    experiment = countdown.Experiment(config)
    step, state = experiment_step(experiment)
    return step.lower(state, small_batch(8)).as_text()


def observe_mesh(config, tmp_path):
    return dict(sharding.make_mesh(config["mesh"]).shape)


def observe_warm_start(config, tmp_path):
    countdown.SHIPPED_WARM_START, shipped = tmp_path / "none", countdown.SHIPPED_WARM_START
    try:
        params = countdown.warm_start(countdown.Experiment(config), tmp_path)
    finally:
        countdown.SHIPPED_WARM_START = shipped
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def observe_rollout(config, tmp_path):
    experiment = countdown.Experiment(config)
    surplus = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.surplus)
    params = fresh_params(config)
    state = types.SimpleNamespace(params=params, reference=params, cursor=0, step=0, surplus=surplus)
    journal = Journal()
    experience = experiment.rollouts()(state, journal, lambda: None)
    plan = experiment.sampler.plan(state.params, 2)  # slots change no token
    return np.asarray(experience.batch.completion_tokens).tolist(), experience.prompts_consumed, plan.slots


def observe_run(config, tmp_path):
    """A whole run whose update learns nothing and whose sampler says nothing: all of the shell, none of the cost."""
    experiment = countdown.Experiment(config)
    said, asked = [], []

    def silent(sampler, params, prompts, prompt_ids, sampling_params, interrupt=None, limits=None):
        asked.append(
            (len(prompts), sampler.group_size, float(sampling_params.temperature), float(sampling_params.top_p))
        )
        said.extend(prompts)
        yield silent_rollout(len(prompts), sampler.group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.sampler.Sampler.waves", silent)
        patch.setattr(
            training, "make_train_step", lambda *_, **__: lambda s, b: (dataclasses.replace(s, step=s.step + 1), {})
        )
        save = Checkpoints.save  # the first checkpoint is the best
        patch.setattr(Checkpoints, "save", lambda store, state, metric=None: save(store, state, -float(state.step)))
        patch.setattr(loop, "_optimizer_count", lambda state: 0)
        _, rows = experiment.run(
            fresh_params(config), objective=objectives.supervised(),
            experience=experiment.rollouts(objective=objectives.supervised()),
            workdir=tmp_path, title="test", optimizer=config["optimizer"], update=config["update"],
            steps=config["train"].steps, evaluator=experiment.evaluator,
            evaluate_every=config["evaluation"].every, samples_every=config["train"].samples_every,
        )  # fmt: skip
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    evaluated = [(row["step"], sorted(name for name in row if name.startswith("eval/"))) for row in rows]
    weights = [reward.weight for reward in experiment.rewards]
    return said, asked, kept, evaluated, weights, (tmp_path / "samples.jsonl").read_text().count("\n")


def fresh_params(config):
    return init_params(config["model"], jax.random.key(0))


def experiment_step(experiment):
    optimizer, _ = optimizers.make_optimizer(optimizers.OptimizerConfig(), 1)
    objective = objectives.grpo()
    state = training.init_train_state(
        experiment.policy, fresh_params(experiment.config), optimizer, objective, experiment.mesh
    )
    update = experiment.config["update"]
    return training.make_train_step(
        experiment.policy, optimizer, objective, update, like=state, key=jax.random.key(0)
    ), state


def small_batch(completions):
    rollout = Rollout(
        prompt_tokens=np.ones((completions // 2, 2), np.int32), prompt_mask=np.ones((completions // 2, 2), bool),
        completion_tokens=np.ones((completions, 3), np.int32), mask=np.ones((completions, 3), bool),
        finished=np.ones(completions, bool), logprobs=np.zeros((completions, 3), np.float32),
        sampler_logprobs=np.zeros((completions, 3), np.float32),
    )  # fmt: skip
    return training.train_batch(rollout, jnp.ones((completions // 2, 2)))


OBSERVE = {
    "task": observe_task, "model": observe_model, "warm_start": observe_warm_start, "rollout": observe_rollout,
    "advantages": observe_advantages, "loss": observe_loss, "optimizer": observe_optimizer, "update": observe_update,
    "train": observe_run, "mesh": observe_mesh, "evaluation": observe_run, "checkpoints": observe_run,
}  # fmt: skip
_before: dict = {}


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_flag_changes_something(section, field, tmp_path):
    if section not in _before:
        (tmp_path / "before").mkdir()
        _before[section] = OBSERVE[section](configs(section), tmp_path / "before")
        (tmp_path / "again").mkdir()
        assert OBSERVE[section](configs(section), tmp_path / "again") == _before[section]  # and nothing else does
    (tmp_path / "after").mkdir()
    assert OBSERVE[section](configs(section, **{field: OTHER[section][field]}), tmp_path / "after") != _before[section]


def test_what_is_asked_about_nans_is_of_every_phase(tmp_path, monkeypatch):
    """Warm start, GRPO, and both baselines, each with a trial before it."""
    asked = []
    row = {"time/step_seconds": 1.0}
    phase = lambda params, **options: asked.append(options) or (types.SimpleNamespace(params=params()), [row] * 3)
    monkeypatch.setattr(phases, "phase", phase)
    experiment = countdown.Experiment(configs("optimizer", max_skipped=3), debug_nans=True)
    params = games.warmed(experiment, tmp_path)
    experiment.train(params, tmp_path, "grpo")
    countdown.run_baselines(experiment, params, tmp_path, 2.0)
    assert [options["title"] for options in asked][:2] == ["warm start", "grpo"]
    assert len(asked) == 6
    assert {(options["debug_nans"], options["optimizer"].max_skipped) for options in asked} == {(True, 3)}
    of_two = countdown.Experiment(configs("mesh", data=2), debug_nans=True)
    with pytest.raises(ValueError, match="--debug_nans works on one device, and the mesh has 2"):
        of_two.check()


def test_the_table_above_is_complete_and_every_flag_explains_itself():
    for section, config in countdown.SECTIONS.items():
        skipped = countdown.SKIPPED if section == "model" else set()
        fields = {field.name for field in dataclasses.fields(config)} - skipped
        assert fields == set(OTHER[section])
        for field in fields:
            flag = flags.FLAGS[f"{section}.{field}"]
            assert len(flag.help) > 5
            assert flag.help != f"{section}.{field}"
            assert flag.default == next(f.default for f in dataclasses.fields(config) if f.name == field)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--kl_coef=0", "there is no flag --kl_coef; did you mean --loss.kl_coef?"),
        ("--group=8", "there is no flag --group; did you mean --rollout.group_size?"),
        ("--mesh=fsdp:2", "there is no flag --mesh; did you mean --mesh.data or --mesh.fsdp or --mesh.tensor?"),
        ("--train.step=9", "there is no flag --train.step; did you mean --train.steps"),
        ("--mesh.expert=2", "there is no flag --mesh.expert. --help shows those there are."),
        ("--train.steps=many", "flag --train.steps=many: invalid literal for int"),
        ("--beta=0.1", "there is no flag --beta; did you mean --loss.kl_coef?"),
        ("--optimizer.lr=0.1", "there is no flag --optimizer.lr; did you mean --optimizer.learning_rate or"),
        ("--output_dir=a", "there is no flag --output_dir; did you mean --workdir?"),
        ("--minibatch=1", "there is no flag --minibatch; did you mean --update.minibatches?"),
        ("--loss=grpo", "there is no flag --loss; did you mean --loss.clamp or --loss.clip_high or"),
        ("--train.steps=9", "--workdir= is required; --help says what for."),
    ],
)
def test_mistakes_in_flags_are_one_line_that_says_what_may_have_been_meant(typed, said):
    with flagsaver.flagsaver(), pytest.raises(SystemExit, match=f"^error: {re.escape(said)}[^\n]*$"):
        parsed(["countdown", typed])
