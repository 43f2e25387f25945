"""What a run of experiments.rlhf does, phase by phase: warm start, preferences, reward model, GRPO."""

import dataclasses
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import phases, runs
from experiments.flags import check_debugging
from experiments.rlhf_task import PROMPT_TOKENS, TOKENIZER, demonstration, prefers_first, prompt, rule
from grpo_jax import hosts, objectives, optimizers, reward_model, sharding, storage, training
from grpo_jax.data import sources
from grpo_jax.data.sources import Prompt
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.microbatches import frozen_logprobs, pack_microbatches
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from grpo_jax.preferences import Pair, PairEvaluator, PairExperience
from grpo_jax.rewards import Reward
from grpo_jax.rewards.model import ModelReward, Scorer
from grpo_jax.rollouts import Experience, GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from grpo_jax.scoring import Journal, completion_texts
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError, read_jsonl, write_atomically
from grpo_jax.types import PyTree, SamplingParams, TrainState

__all__ = [
    "ARMS",
    "Experiment",
    "GroupConfig",
    "HeldOut",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "RewardModelConfig",
    "SupervisedConfig",
    "TrainConfig",
]

# Configuration ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy; the reward model is another of that size, and begins as the warm start."""

    layers: int = 2  # blocks
    width: int = 64  # of the residual stream, in heads of 16

    def __post_init__(self) -> None:
        if self.layers < 1 or self.width < 16 or self.width % 16:
            raise ValueError(f"layers={self.layers} must be 1 or more, width={self.width} a multiple of 16.")

    @property
    def transformer(self) -> TransformerConfig:
        """As a decoder."""
        heads = self.width // 16
        return TransformerConfig(
            vocab_size=TOKENIZER.vocab_size, layers=self.layers, width=self.width, heads=heads, kv_heads=heads,
            mlp_width=2 * self.width,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The warm start, on demonstrations."""

    steps: int = 600  # optimizer steps
    batch: int = 64  # demonstrations a step
    learning_rate: float = 3e-3  # at its peak; cosine to 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch} and learning_rate={self.learning_rate} must be above 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What the labeller compares."""

    pairs: int = 512  # of texts of the policy, for training, an iteration
    held_out: int = 256  # pairs that the reward model is measured on
    noise: float = 0.1  # of the labeller, who prefers a to b with the chance sigmoid((rule(a) - rule(b)) / noise)
    replay: float = 0.1  # share of old pairs among those that a reward model goes on with

    def __post_init__(self) -> None:
        if min(self.pairs, self.held_out) < 1 or self.noise <= 0 or not 0 <= self.replay < 1:
            raise ValueError(
                f"pairs={self.pairs}, held_out={self.held_out} and noise={self.noise} must be above 0, "
                f"replay={self.replay} in [0, 1)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The reward model, an iteration."""

    steps: int = 100  # optimizer steps
    batch: int = 32  # pairs a step
    learning_rate: float = 1e-3  # at its peak; cosine to 0
    center_coef: float = 0.01  # of the squared sum of a pair's scores

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.learning_rate <= 0 or self.center_coef < 0:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch} and learning_rate={self.learning_rate} must be above 0, "
                f"center_coef={self.center_coef} 0 or more."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(RolloutConfig):
    """What is sampled at every step: prompts x group_size completions."""

    prompts: int = 16  # prompts a step
    max_tokens: int = 16  # a completion is cut there


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(objectives.LossConfig):
    """The objective of GRPO; of the arm without KL, all but `kl_coef`."""

    kl_coef: float = 0.3  # beta of the arm with KL


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(optimizers.OptimizerConfig):
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 1e-3  # at its peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 200  # of GRPO, an iteration

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more.")


ARMS = {"without KL": 0.0, "with KL": 1.0}  # what kl_coef is multiplied by


class Experiment:
    """The pieces of one configuration and seed, shared by the phases of the run."""

    def __init__(self, config: dict[str, Any], seed: int, *, debug_nans: bool = False):
        """Raises ValueError where the pieces do not fit together."""
        self.config, self.seed, self.mesh = config, seed, sharding.make_mesh(config["mesh"])
        hosts.check_mesh(self.mesh)
        check_debugging(debug_nans, self.mesh)
        self.debug_nans = debug_nans
        rollout, self.model = config["rollout"], config["model"].transformer
        self.scored = dataclasses.replace(self.model, score=True)
        self.policy, self.judge = make_policy(self.model, self.mesh), make_policy(self.scored, self.mesh)
        self.key = jax.random.key(seed)
        if not rollout.max_tokens:
            raise ValueError("rollout.max_tokens=0 must be 1 or more: nothing else says how long texts are.")
        if not config["loss"].kl_coef:
            raise ValueError("loss.kl_coef=0: both arms would be the same; it is that of the arm with KL.")
        training.check_divides(rollout.prompts * rollout.group_size, config["update"], self.mesh)
        sizes = {"rollout.prompts": rollout.prompts, "warm_start.batch": config["warm_start"].batch,
                 "reward_model.batch": config["reward_model"].batch}  # fmt: skip
        runs.check_multiples(self.mesh, sizes)
        runs.check_offload(config["optimizer"], self.mesh)
        self.scorer = self._scorer(self.mesh)  # of what trains
        self._own = hosts.own_mesh(self.mesh)
        self._proxy = self.scorer if self._own is self.mesh else self._scorer(self._own)
        self.sampler = Sampler(
            self.policy, self.mesh, TOKENIZER, group_size=rollout.group_size, max_tokens=rollout.max_tokens,
            max_prompt_tokens=PROMPT_TOKENS, key=jax.random.fold_in(self.key, 0), stop=rollout.stop,
            slots=rollout.slots,
        )  # fmt: skip
        # Compiled once, for all phases.
        self._reference_logprobs = training.make_reference_logprobs(self.policy, config["update"], self.mesh)
        self._steps: dict[str, Any] = {}
        logprobs = lambda params, batch: frozen_logprobs(
            self.policy, params, pack_microbatches(self.policy, batch, batch.mask, 1, self.mesh), self.mesh
        )[0]
        self._logprobs = jax.jit(logprobs)

    def _scorer(self, mesh: Mesh) -> Scorer:
        judge = make_policy(self.scored, mesh)
        return Scorer(judge, mesh, vocab_size=self.model.vocab_size, pad_id=TOKENIZER.pad_id)

    def phase(self, params: PyTree, **options: Any) -> tuple[TrainState, list[dict[str, Any]]]:
        """One phase of the run, of the policy unless `options` say otherwise."""
        shared = {
            "policy": self.policy, "model": self.model, "mesh": self.mesh, "key": self.key,
            "update": training.UpdateConfig(), "checkpoints": self.config["checkpoints"],
            "debug_nans": self.debug_nans,
        }  # fmt: skip
        return phases.phase(lambda: params, **{**shared, **options})

    def _optimizer(self, learning_rate: float) -> optimizers.OptimizerConfig:
        """Of what is supervised; it gives up where GRPO's does."""
        return optimizers.OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=20, decay="cosine",
            max_skipped=self.config["optimizer"].max_skipped,
        )  # fmt: skip

    def warm_start(self, workdir: Path) -> PyTree:
        """The policy before anything was preferred."""
        config: SupervisedConfig = self.config["warm_start"]
        experience = Demonstrations(
            source=lambda cursor: demonstration(self.seed, cursor), tokenizer=TOKENIZER, batch=config.batch,
            max_prompt_tokens=PROMPT_TOKENS, max_tokens=13, end_id=TOKENIZER.eos_ids[0],
        )  # fmt: skip
        state, _ = self.phase(
            init_params(self.model, self.key), objective=objectives.supervised(), experience=experience,
            workdir=workdir, title="warm start", optimizer=self._optimizer(config.learning_rate), steps=config.steps,
        )  # fmt: skip
        return state.params

    def texts(self, params: PyTree, split: str, groups: int) -> Iterator[tuple[str, list[list[int]], list[str]]]:
        """A policy's samples for prompts of a split: each prompt, with tokens and texts of its group.

        As many at a time as in a step, so that nothing is compiled for it.
        """
        size, group = self.config["rollout"].prompts, self.sampler.group_size
        for start in range(0, groups, size):
            # Not the numbers of prompts that are trained on: a text's randomness goes by these.
            ids = [zlib.crc32(split.encode()) // 2 + 2**31 + i for i in range(start, start + size)]
            asked = [prompt(self.seed, split, i) for i in range(start, start + size)]
            rollout = hosts.fetched(self.sampler(params, asked, ids, SamplingParams()))
            tokens, texts = completion_texts(rollout, TOKENIZER)
            for i in range(min(size, groups - start)):
                yield asked[i], tokens[i * group : (i + 1) * group], texts[i * group : (i + 1) * group]

    def preferences(self, params: PyTree, path: Path, iteration: int) -> list[dict[str, Any]]:
        """Pairs of a policy's texts, as the labeller has them: those for training, then those held out."""
        config: PreferenceConfig = self.config["preferences"]
        count, each = config.pairs + config.held_out, self.sampler.group_size // 2
        rows = read_jsonl(path)
        if not hosts.agreed(len(rows) != count):  # a network's file system may show the others less
            return rows
        rows = []
        for asked, tokens, texts in self.texts(params, f"preferences {iteration}", -(-count // each)):
            for first in range(0, 2 * each, 2):
                key = f"{self.seed}/label/{iteration}/{len(rows)}"
                ahead = prefers_first(asked, texts[first : first + 2], config.noise, key)
                chosen, rejected = (first, first + 1) if ahead else (first + 1, first)
                rows.append(
                    {"prompt": asked, "chosen": texts[chosen], "rejected": texts[rejected],
                     "tokens": [tokens[chosen], tokens[rejected]]}
                )  # fmt: skip
        rows = rows[:count]

        def write() -> None:
            storage.make_directory(path.parent)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))

        hosts.first_does(write, kind=WorkdirError)
        return rows

    def learn_rewards(
        self, params: PyTree, rows: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]], workdir: Path
    ) -> tuple[PyTree, dict[str, float]]:
        """A reward model from `params`, on new preferences and some old ones; what is said of it on those held out."""
        config: RewardModelConfig = self.config["reward_model"]
        preferences: PreferenceConfig = self.config["preferences"]
        new, held_out = rows[: preferences.pairs], rows[preferences.pairs :]
        replayed = round(len(new) * preferences.replay / (1 - preferences.replay)) if old else 0
        new = [*new, *random.Random(f"{self.seed}/replay/{len(old)}").choices(old, k=replayed)] if replayed else new

        def make_step(optimizer: Any, **made: Any) -> Any:
            loss = lambda *pairs: reward_model.bradley_terry(*pairs, center_coef=config.center_coef)
            return self._once(
                "reward model",
                lambda: reward_model.make_pair_step(self.judge, optimizer, loss, pad_id=TOKENIZER.pad_id, **made),
            )

        state, log = self.phase(
            params, policy=self.judge, model=self.scored, objective=objectives.supervised(),
            experience=PairExperience(source=sources.shuffled(_pairs(new), self.seed), batch=config.batch),
            workdir=workdir, title="reward model", optimizer=self._optimizer(config.learning_rate), steps=config.steps,
            evaluator=PairEvaluator(self.scorer, _pairs(held_out)),
            make_step=make_step,
        )  # fmt: skip
        return state.params, _evaluated(log[-1])

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """A compiled step of an earlier phase of that kind, or a new one."""
        if name not in self._steps:
            self._steps[name] = make()
        return self._steps[name]

    def optimize(
        self, params: PyTree, judge: PyTree, start: PyTree, kl_coef: float, iteration: int, workdir: Path,
        title: str,
    ) -> tuple[PyTree, list[dict[str, Any]]]:  # fmt: skip
        """GRPO from `params`, which are the reference too, against a reward model."""
        config = self.config
        # Without KL nothing that belongs to it may be set.
        given = config["loss"] if kl_coef else dataclasses.replace(
            config["loss"], kl_coef=0.0, kl="k3", weighted_kl=False, kl_in_reward=False
        )  # fmt: skip
        update = config["update"] if kl_coef else dataclasses.replace(
            config["update"], reference_every=0, reference_mix=1.0
        )  # fmt: skip
        objective = objectives.make_objective(given)
        if self._own is not self.mesh:
            judge = hosts.moved(judge, sharding.shardings(*abstract_params(self.scored), self._own))
        proxy = ModelReward(scorer=self._proxy, params=judge, tokenizer=TOKENIZER)
        rewards = (Reward(name="rule", function=rule, weight=0.0), Reward(name="proxy", function=proxy, on_device=True))
        first = iteration * config["train"].steps * config["rollout"].prompts
        experience = GroupRollouts(
            sampler=self.sampler, source=lambda i: Prompt(text=prompt(self.seed, "train", first + i)),
            rewards=rewards, config=config["rollout"], objective=objective,
            reference_logprobs=self._reference_logprobs,
        )  # fmt: skip

        def make_step(optimizer: Any, **made: Any) -> Any:
            key = jax.random.fold_in(self.key, 1)
            return self._once(
                f"KL {kl_coef}",
                lambda: training.make_train_step(self.policy, optimizer, objective, update, key=key, **made),
            )

        state, rows = self.phase(
            params, objective=objective, experience=self._measured(experience, start), workdir=workdir, title=title,
            optimizer=config["optimizer"], update=update, steps=config["train"].steps,
            evaluator=HeldOut(self, proxy), evaluate_every=config["train"].steps, samples_every=100,
            make_step=make_step,
        )  # fmt: skip
        return state.params, rows

    def _measured(
        self, experience: GroupRollouts, start: PyTree
    ) -> Callable[[TrainState, Journal, Callable[[], None]], Experience]:
        """The experience, with an estimate of KL(policy || start) in nats a completion: with a reference or without."""

        def measured(state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
            got = experience(state, journal, interrupt)
            ours, theirs, mask = hosts.fetched(
                (got.batch.sampler_logprobs, self._logprobs(start, got.batch), got.batch.mask)
            )
            kl = float(np.where(mask, ours - theirs, 0).sum(axis=1).mean())
            return dataclasses.replace(got, metrics={**got.metrics, "kl_to_start": kl})

        return measured

    def run(self, workdir: Path, iterations: int) -> dict[str, Any]:
        """Everything, or what is left of it: by arm the metrics of all steps; and what the reward models are worth."""
        start = self.warm_start(workdir / "warm_start")
        shapes = abstract_params(self.scored)[0]
        first = {name: start.get(name, np.zeros(shapes["score"].shape, np.float32)) for name in shapes}
        rows = self.preferences(start, workdir / "preferences.jsonl", 0)
        judge, said = self.learn_rewards(first, rows, (), workdir / "reward_model")
        arms: dict[str, list[dict[str, Any]]] = {}
        held_out, evaluations = {"first": said}, {}
        for arm, factor in ARMS.items():
            params, judges, known = start, judge, rows[: self.config["preferences"].pairs]
            place, arms[arm] = workdir / arm.replace(" ", "_"), []
            for i in range(iterations):
                if i:
                    new = self.preferences(params, place / f"preferences_{i}.jsonl", i)
                    judges, said = self.learn_rewards(judges, new, known, place / f"reward_model_{i}")
                    held_out[f"{arm}, iteration {i + 1}"] = said
                    known = [*known, *new[: self.config["preferences"].pairs]]
                coefficient = factor * self.config["loss"].kl_coef
                title = arm if iterations == 1 else f"{arm}, iteration {i + 1}"
                params, log = self.optimize(params, judges, start, coefficient, i, place / f"policy_{i}", title)
                arms[arm] += [{**row, "iteration": i + 1} for row in log if row["step"] > 0]
                evaluations.setdefault(arm, []).append([_evaluated(log[0]), _evaluated(log[-1])])
        return {"arms": arms, "reward_models": held_out, "evaluations": evaluations}


class HeldOut:
    """Measures a policy on held-out prompts, by the truth and by what it is trained on: `loop.Evaluation`."""

    GROUPS = 64

    def __init__(self, experiment: Experiment, proxy: ModelReward):
        """Of samples, as many of each prompt as a group has."""
        self._experiment, self._proxy = experiment, proxy

    def full(self, params: PyTree, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Means `eval/rule` and `eval/proxy`; `eval/accuracy`, the share with more than half of what can be had."""
        truth, proxy = [], []
        for asked, tokens, texts in self._experiment.texts(params, "held_out", self.GROUPS):
            interrupt()
            prompts = [asked] * len(texts)
            truth += rule(prompts, texts)
            proxy += self._proxy(prompts, texts, tokens)
        accuracy = float((np.array(truth) > 0.5).mean())
        return {"eval/accuracy": accuracy, "eval/rule": float(np.mean(truth)), "eval/proxy": float(np.mean(proxy))}

    greedy = full


def _pairs(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """In tokens: as they were sampled, without a detour through text."""
    whole = lambda row, i: [*TOKENIZER.encode(row["prompt"]), *row["tokens"][i]]
    return [Pair(chosen=whole(row, 0), rejected=whole(row, 1)) for row in rows]


def _evaluated(row: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
