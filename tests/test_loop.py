import dataclasses
import functools
import itertools
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import loop, objectives, optimizers, sharding, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.evaluation import EvaluationConfig, Evaluator
from grpo_jax.jsonl import JsonLines
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rollouts import Experience, GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from grpo_jax.scoring import interruptibly, journaled_scores, score_rollout
from grpo_jax.telemetry import WorkdirError, read_jsonl
from grpo_jax.types import TrainState
from tests.compilations import Compilations
from tests.silent import silent_rollout


def fresh():
    everywhere = sharding.replicated(sharding.make_mesh())
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params={"w": jnp.arange(3.0)}, reference=None, opt_state=(zero,), step=zero + 0, cursor=zero + 0)
    return jax.device_put(state, everywhere)


@jax.jit
def double(state, batch):
    """An update whose result depends on everything that is carried."""
    new = TrainState(
        params={"w": state.params["w"] * 2 + batch}, reference=None, opt_state=(state.opt_state[0] + 1,),
        step=state.step + 1, cursor=state.cursor,
    )  # fmt: skip
    return new, {"loss": new.params["w"].sum()}


def experience(state, journal, interrupt):
    interrupt()
    return Experience(batch=np.float32(int(state.cursor)), prompts_consumed=3, metrics={"reward": float(state.cursor)})


def run(workdir, steps, **changes):
    arguments = {"train_step": double, "experience": experience, "checkpoints": CheckpointConfig(every=2), **changes}
    return loop.train(fresh(), steps=steps, workdir=workdir, **arguments)


def test_straight_and_in_two_halves(tmp_path):
    straight, rows = run(tmp_path / "a", 7)
    run(tmp_path / "b", 4)
    halves, again = run(tmp_path / "b", 7)
    np.testing.assert_array_equal(straight.params["w"], halves.params["w"])
    assert int(halves.cursor) == 21
    assert [row["step"] for row in again] == list(range(8))
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in again]


def test_where_no_checkpoint_is_whole_it_is_said_that_all_begins_again(tmp_path, capsys):
    run(tmp_path, 3)
    assert "no whole checkpoint" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints")
    run(tmp_path, 3)
    assert "train: no whole checkpoint is in" in capsys.readouterr().out


def test_a_complete_run_is_left_alone(tmp_path):
    run(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    state, _ = run(tmp_path, 3, experience=None)
    assert int(state.step) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_diagnosis_is_said_when_it_begins_and_then_as_rarely_as_other_lines(tmp_path, capsys):
    def often_cut(state, journal, interrupt):
        step = int(state.step) + 1
        cut = {"completions/clipped_ratio": float(step >= 5 and step != 8), "loss": 1.0}
        mismatch = {"sampling/sampling_logp_difference/mean": 0.2 + step / 100 if step == 12 else 0.0}
        return Experience(batch=np.float32(0), prompts_consumed=1, metrics=cut | mismatch)

    run(
        tmp_path, 80, experience=often_cut, checkpoints=CheckpointConfig(every=40)
    )  # a line every 4 steps, a diagnosis every 10
    lines = [line for line in capsys.readouterr().out.splitlines() if "truncated:" in line or "mismatch:" in line]
    assert [line.split(": ")[1:3] for line in lines[:4]] == [
        ["step 5", "truncated"], ["step 12", "mismatch"], ["step 15", "truncated"], ["step 25", "truncated"],
    ]  # fmt: skip
    assert len(lines) == 1 + len(range(5, 81, 10))


def test_the_screen_shows_the_history_to_the_diagnoses(tmp_path, capsys):
    def collapsing(state, journal, interrupt):
        metrics = {"reward": 0.0, "entropy": 1.0 if int(state.step) == 0 else 0.05}
        return Experience(batch=np.float32(0), prompts_consumed=1, metrics=metrics)

    run(tmp_path, 2, experience=collapsing)
    assert "step 2: entropy collapse: 0.05 nats a token, 5.0% of the first step's" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_step_and_says_so_in_the_exit_code(tmp_path, number, capsys):
    def signalled(state, journal, interrupt):
        if int(state.step) == 3:
            os.kill(os.getpid(), number)
        return experience(state, journal, interrupt)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, 9, experience=signalled)
    assert stopped.value.code == 128 + number
    # The rollout of step 4 was cut short and is discarded.
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == 3
    assert "stopped after step 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed, _ = run(tmp_path, 9)
    straight, _ = run(tmp_path / "straight", 9)
    np.testing.assert_array_equal(resumed.params["w"], straight.params["w"])


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path):
    class Evaluator:
        def greedy(self, params, interrupt=None):
            if int(params["w"][0]) > 0:  # not before the first step
                os.kill(os.getpid(), signal.SIGTERM)
            return {"eval/accuracy": 0.5}

        full = greedy

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, 2, evaluator=Evaluator())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps == [2]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    run(tmp_path, 3)
    original = JsonLines.append

    def full(self, row, durable=False):
        if row["step"] == 6:
            self._file = pathlib.Path("/dev/full").open("a")  # noqa: SIM115
        original(self, row, durable)

    monkeypatch.setattr(JsonLines, "append", full)
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl.*No space left.*already saved are intact"):
        run(tmp_path, 9)
    monkeypatch.undo()
    resumed, _ = run(tmp_path, 9)
    straight, _ = run(tmp_path / "straight", 9)
    np.testing.assert_array_equal(resumed.params["w"], straight.params["w"])


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("everything", [False, True])
def test_rewards_that_cannot_be_written_end_the_run_and_the_last_step_is_saved(tmp_path, capsys, everything):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, journal, interrupt):
        if int(state.step) == 5:
            if everything:  # stands in for the disk: no file may grow beyond this
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            journal._lines._lines._file = pathlib.Path("/dev/full").open("a")  # noqa: SIM115
            journal.write(5, 0, "digest", {})
        return experience(state, journal, interrupt)

    try:
        with pytest.raises(WorkdirError, match=r"cannot write .*rewards\.jsonl: No space left"):
            run(tmp_path, 9, experience=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().out
    assert (Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == 5) != everything
    assert ("step 5 cannot be saved either: " if everything else "step 5 is saved. Mend what is wrong") in said
    resumed, _ = run(tmp_path, 9)
    straight, _ = run(tmp_path / "straight", 9)
    np.testing.assert_array_equal(resumed.params["w"], straight.params["w"])


def test_a_failing_reward_ends_the_run_and_loses_nothing(tmp_path, capsys):
    def failing(state, journal, interrupt):
        if int(state.step) in (0, 5) and fails:
            raise RewardError("reward function 'r' returned nan for completion 1")
        return experience(state, journal, interrupt)

    fails = True
    with pytest.raises(RewardError, match="returned nan"):
        run(tmp_path, 9, experience=failing)
    assert not Checkpoints(tmp_path / "checkpoints", read_only=True).steps  # of step 0 there is nothing to save
    fails = False
    run(tmp_path, 4, experience=failing)
    fails = True
    for _ in range(2):
        with pytest.raises(RewardError, match="returned nan"):
            run(tmp_path, 9, experience=failing)
        assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == 5
        assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("step 5 is saved. Mend what is wrong, and the same command goes on.") == 1


@pytest.mark.parametrize("fails_at", [6, 9])
def test_a_reward_that_fails_in_an_evaluation_leaves_the_step_to_be_done_again(tmp_path, fails_at):
    """It has no line in the log yet, so it must not have a checkpoint either."""

    class Evaluator:
        steps = iter((0, 3, 6, 9, 9))  # after the failure at least that one again

        def greedy(self, params, interrupt=None):
            if next(self.steps) == fails_at:
                raise RewardError("reward function 'r' returned nan for completion 1")
            return {"eval/accuracy": 0.5}

        full = greedy

    with pytest.raises(RewardError, match="returned nan"):
        run(tmp_path, 9, evaluator=Evaluator(), evaluate_every=3)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == {6: 4, 9: 8}[fails_at]
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [*range(fails_at)]
    fails_at = None
    _, rows = run(tmp_path, 9, evaluator=Evaluator(), evaluate_every=3)
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3, 6, 9]


def test_the_parts_of_a_step_add_up_and_evaluations_are_of_none(tmp_path, monkeypatch, capsys):
    now = 100.0

    def taking(seconds, function):
        def slow(*arguments, **options):
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        return slow

    def sampled(state, journal, interrupt):
        seconds = {"rollout_seconds": 2.0, "reward_seconds": 1.0, "reference_seconds": 0.5}
        return dataclasses.replace(experience(state, journal, interrupt), **seconds)

    class Evaluator:
        greedy = full = staticmethod(taking(10, lambda params, interrupt=None: {"eval/accuracy": 0.5}))

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loop.RunLog, "write", taking(1, loop.RunLog.write))
    monkeypatch.setattr(Checkpoints, "save", taking(2, Checkpoints.save))
    _, rows = run(
        tmp_path, 4, experience=taking(4, sampled), train_step=taking(3, double), evaluator=Evaluator(),
        evaluate_every=3, checkpoints=CheckpointConfig(every=2),
    )  # fmt: skip
    column = lambda name: [row.get(f"time/{name}_seconds") for row in rows]
    # Its own 4 + 3, and what the step before left to do: a line of the log, and a checkpoint of steps 2 and 3.
    assert column("step") == [None, 7, 8, 10, 10]
    assert column("other") == [None, 0.5, 1.5, 3.5, 3.5]
    assert column("elapsed") == [0, 7, 15, 25, 35]
    assert column("evaluation") == [10, None, None, 10, 10]
    assert {*column("rollout")[1:], *column("reward")[1:], *column("reference")[1:], *column("update")[1:]} == {
        2,
        1,
        0.5,
        3,
    }
    assert "10s (rollout 20% rewards 10% reference 5% update 30% other 35%)" in capsys.readouterr().out


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    straight, rows = run(tmp_path / "straight", 6)
    year, steps, clock = 365 * 86400, [0], time.time

    def jumping(state, *rest):
        steps[0] += 1  # a year back, a year ahead, and so on
        monkeypatch.setattr(time, "time", lambda: clock() + (-year if steps[0] % 2 else year))
        return experience(state, *rest)

    for until in (3, 6):
        jumped, again = run(tmp_path / "jumped", until, experience=jumping)
    assert steps == [6]
    np.testing.assert_array_equal(straight.params["w"], jumped.params["w"])
    assert [row["step"] for row in read_jsonl(tmp_path / "jumped" / "metrics.jsonl")] == list(range(7))
    assert [row.get("loss") for row in again] == [row.get("loss") for row in rows]
    assert all(0 <= row["time/step_seconds"] < 600 for row in again[1:])
    (path,) = (tmp_path / "jumped" / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # records: a length, its checksum, an event, its checksum
        (length,) = np.frombuffer(content[:8], np.uint64).tolist()
        body, (checksum,) = content[12 : 12 + length], np.frombuffer(content[12 + length : 16 + length], np.uint32)
        assert masked_crc32c(body) == checksum
        events.append(event_pb2.Event.FromString(body))
        content = content[16 + length :]
    losses = {
        e.step: e.summary.value[0].simple_value for e in events if e.summary.value and e.summary.value[0].tag == "loss"
    }
    assert losses == {row["step"]: np.float32(row["loss"]) for row in rows[1:]}
    times = [e.wall_time for e in events[1:]]
    assert times == sorted(times)


def test_a_clock_that_is_set_forward_during_a_save_costs_at_most_that_checkpoint(tmp_path, monkeypatch):
    """Orbax gives a save 20 minutes by the clock: at every look at it here a day has gone."""
    straight, _ = run(tmp_path / "straight", 6)
    run(tmp_path / "jumped", 3)
    clock, days, before = time.time, itertools.count(), set(threading.enumerate())
    monkeypatch.setattr(time, "time", lambda: clock() + 86400 * next(days))
    with pytest.raises(WorkdirError, match=r"cannot write a checkpoint .* timed out"):
        run(tmp_path / "jumped", 6)
    monkeypatch.setattr(time, "time", clock)
    for thread in set(threading.enumerate()) - before:  # another process would have none of its writers
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # Orbax's own raises what the thread has
    assert 3 in Checkpoints(tmp_path / "jumped" / "checkpoints", read_only=True).steps
    again, rows = run(tmp_path / "jumped", 6)
    np.testing.assert_array_equal(straight.params["w"], again.params["w"])
    assert [row["step"] for row in rows] == list(range(7))


def compiled_by_step(workdir, steps, change=lambda batch, step: batch):
    """What a real run with a tiny model compiles, by step; and the mean lengths of its completions."""
    tokenizer, mesh, key = ByteTokenizer("abcd"), sharding.make_mesh(), jax.random.key(0)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16
    )
    policy, sizes = make_policy(config), {"max_tokens": 12, "max_prompt_tokens": 3}
    source = lambda i: Prompt(text="abc"[: 1 + i % 3], columns={})
    # At last completions end with their first token.
    rewards = [Reward(name="short", function=lambda completions, **columns: [-len(text) / 12 for text in completions])]
    objective, update = (
        objectives.make_objective(objectives.LossConfig(kl_coef=0.1)),
        training.UpdateConfig(minibatches=2, microbatches=2),
    )
    optimizer, schedule = optimizers.make_optimizer(optimizers.OptimizerConfig(learning_rate=1e-2), 2 * steps)
    state = training.init_train_state(policy, init_params(config, key), optimizer, objective, mesh)
    rollouts = GroupRollouts(
        sampler=Sampler(policy, mesh, tokenizer, group_size=4, key=key, chunk=4, slots=5, **sizes), source=source,
        rewards=rewards, config=RolloutConfig(prompts=4, group_size=4), objective=objective,
        reference_logprobs=training.make_reference_logprobs(policy, update, mesh),
    )  # fmt: skip
    evaluation = EvaluationConfig(prompts=4, sampled_prompts=4, samples=4)
    by_step = []

    def experience(state, *rest):
        by_step.append(len(heard))
        experienced = rollouts(state, *rest)
        return dataclasses.replace(experienced, batch=change(experienced.batch, len(by_step)))

    with Compilations() as heard:
        _, rows = loop.train(
            state, steps=steps, workdir=workdir, experience=experience, learning_rate=schedule, evaluate_every=5,
            train_step=training.make_train_step(policy, optimizer, objective, update, like=state, key=key),
            evaluator=Evaluator(policy, mesh, tokenizer, source, rewards, evaluation, key=key, **sizes),
            checkpoints=CheckpointConfig(every=10), samples_every=7,
        )  # fmt: skip
    return [heard[a:b] for a, b in itertools.pairwise([*by_step, len(heard)])], {
        row["completions/mean_length"] for row in rows[1:]
    }


def test_a_signal_waits_for_no_reward(tmp_path):
    """Which a worker is still judging: its step is asked again, and the run ends as if it had not been stopped."""
    place, rollout = tmp_path / "place", silent_rollout(1, 2)
    place.mkdir()

    def judge(completions, step, **_):
        if step[0] == 3 and pool is not None:
            pool.judge(f"{pathlib.Path(__file__).parent / 'pool_jobs.py'}:stop", [{"place": str(place)}])
        return [float(i + step[0]) for i in range(len(completions))]

    rewards, tokenizer = [Reward(name="r", function=judge)], ByteTokenizer()

    def scored(state, journal, interrupt):
        step, experienced = int(state.step), experience(state, journal, interrupt)
        score = functools.partial(
            score_rollout, rewards, [Prompt(text="p", columns={"step": step})], rollout, tokenizer, 2
        )
        interruptible = lambda: interruptibly([score], rewards, interrupt)[0]
        scores = journaled_scores(interruptible, rewards, rollout, journal, step, 0)
        return dataclasses.replace(experienced, batch=np.float32(scores.by_name["r"].sum()))

    def signal_once_it_is_judged():
        while not (place / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    journaled = lambda where: [(r["step"], r["scores"]) for r in read_jsonl(where / "rewards.jsonl")]
    with Pool(1, limits=Limits(cpu_seconds=600, wall_seconds=10**6)) as pool:
        threading.Thread(target=signal_once_it_is_judged).start()
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "stopped", 6, experience=scored)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True).steps[-1] == 3
        assert [step for step, _ in journaled(tmp_path / "stopped")] == [0, 1, 2]
        (place / "go").touch()
        resumed, _ = run(tmp_path / "stopped", 6, experience=scored)
    pool = None
    straight, _ = run(tmp_path / "straight", 6, experience=scored)
    np.testing.assert_array_equal(resumed.params["w"], straight.params["w"])
    assert journaled(tmp_path / "stopped") == journaled(tmp_path / "straight")


def test_nothing_is_compiled_after_the_first_two_steps(tmp_path):
    compiled, lengths = compiled_by_step(tmp_path, 50)
    assert len(compiled) == 50
    assert len(lengths) > 10  # there was something to be surprised by
    assert len(compiled[0]) > 5
    assert not any(compiled[2:]), {step: names for step, names in enumerate(compiled) if step > 1 and names}


def test_a_batch_of_another_width_is_compiled_again_and_noticed(tmp_path):
    def cut(batch, step):
        shorter = lambda x: x[:, :11] if step == 4 else x
        of_tokens = ("completion_tokens", "mask", "sampler_logprobs", "ref_logprobs")
        changed = {name: shorter(getattr(batch, name)) for name in of_tokens}
        return dataclasses.replace(batch, **changed)

    compiled, _ = compiled_by_step(tmp_path, 5, cut)
    assert not compiled[2]
    assert "backend_compile_duration of jit(train_step)" in compiled[3]
    assert not compiled[4]
