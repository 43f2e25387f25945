"""Rollouts that are cut to the memory: functions see a part at a time, while the next is sampled."""

import json
import os
import signal
import threading
import time
import zlib

import jax
import numpy as np
import pytest

from grpo_jax.loop import Stopped
from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Judged, Reward, RewardError
from grpo_jax.sampler import Plan
from tests.test_rollouts import LIMIT, G, Journal, P, collect, make_sampler, objective_of


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def cut():
    """Samples one prompt at a time."""
    sampler = make_sampler()
    sampler._plans[P] = Plan(prompts=1, slots=0)
    return sampler


def by_text(seen=None, name="r"):
    """Rewards that depend on a completion and its column alone."""

    def reward(completions, n, **_):
        if seen is not None:
            seen.append((list(n), threading.current_thread()))
        items = [float(zlib.crc32(f"{name}{text}{i}".encode()) % 7) for text, i in zip(completions, n, strict=True)]
        failed = [value < 2 for value in items]
        return Judged([None if f else v for v, f in zip(items, failed, strict=True)], failed=failed, seconds=items)

    return reward


class OfOthers(Journal):
    """Knows of another sampling: nothing may be scored before all is sampled."""

    def knows(self, step, wave):
        return True


def untimed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("objective", ["grpo", "grpo_process"])
def test_scored_while_the_next_are_sampled_or_afterwards_is_the_same(sampler, cut, objective):
    rewards = [Reward(name="r", function=by_text(), high=5.0), Reward(name="s", function=by_text(name="s"), weight=0.5)]
    options = {"objective": objective_of(objective), "advantages": AdvantageConfig(normalize_each=True)}
    ahead, after, whole = Journal(), OfOthers(), Journal()
    overlapped, sequential = (collect(cut, rewards, journal, **options) for journal in (ahead, after))
    uncut = collect(sampler, rewards, whole, **options)
    assert json.dumps([*ahead.items()]) == json.dumps([*after.items()]) == json.dumps([*whole.items()])
    (record,) = ahead.values()
    assert record["failed"]["r"]
    assert untimed(overlapped.metrics) == untimed(sequential.metrics) == untimed(uncut.metrics)
    assert overlapped.metrics["rewards/r/clipped"] > 0
    assert overlapped.samples == sequential.samples == uncut.samples
    bits = lambda experience: [np.asarray(x).tobytes() for x in jax.tree.leaves(experience.batch)]
    assert bits(overlapped) == bits(sequential)
    np.testing.assert_array_equal(overlapped.batch.advantages, uncut.batch.advantages)
    np.testing.assert_array_equal(overlapped.batch.completion_tokens, uncut.batch.completion_tokens)


def test_functions_see_whole_groups_one_part_after_the_other(sampler, cut):
    for journal in (Journal(), OfOthers()):
        seen = []
        collect(cut, by_text(seen), journal)
        assert [n for n, _ in seen] == [[i] * G for i in range(8, 12)]
        assert threading.main_thread() not in {thread for _, thread in seen}
    seen = []
    collect(sampler, by_text(seen))
    ((numbers, thread),) = seen
    assert numbers == [i for i in range(8, 12) for _ in range(G)]  # nothing is cut
    assert thread is not threading.main_thread()


def test_beside_a_function_that_uses_the_device_nothing_is_scored_before_all_is_sampled(cut, monkeypatch):
    """Else two threads would run programs; what is said is the same."""
    plain, seen, journal, of_plain = by_text(name="s"), [], Journal(), Journal()
    rewards = lambda on_device: [
        Reward(name="s", function=plain), Reward(name="r", function=by_text(seen), on_device=on_device)
    ]  # fmt: skip
    begun = watched(monkeypatch, cut)
    counts = []
    collect(
        cut,
        [*rewards(True), Reward(name="c", function=lambda n, **_: counts.append(len(begun)) or [1.0] * len(n))],
        journal,
    )
    assert counts == [P] * P
    assert {thread for _, thread in seen} == {threading.main_thread()}
    seen.clear()
    collect(cut, [*rewards(False), Reward(name="c", function=lambda n, **_: [1.0] * len(n))], of_plain)
    assert threading.main_thread() not in {thread for _, thread in seen}  # what it would have been
    assert json.dumps([*journal.items()]) == json.dumps([*of_plain.items()])


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.001)


def watched(monkeypatch, sampler, before=lambda begun: None):
    """The threads in which parts have been begun; `before` each it is told of those before."""
    begun, programs = [], sampler._programs

    def counting(*arguments):
        before(begun)
        begun.append(threading.current_thread())
        return programs(*arguments)

    monkeypatch.setattr(sampler, "_programs", counting)
    return begun


def test_the_device_samples_the_next_while_a_part_is_scored(cut, monkeypatch):
    """A function ends when the next part has begun, and the one behind it begins when the function has been asked."""
    asked = []
    begun = watched(monkeypatch, cut, lambda begun: until(lambda: len(asked) >= len(begun) - 1))

    def reward(n, **_):
        asked.append(n[0])
        until(lambda: len(begun) >= min(n[0] - 8 + 2, P))
        return [1.0] * len(n)

    collect(cut, reward)
    assert begun == [threading.main_thread()] * P


def test_what_a_function_raises_stops_the_sampling(cut, monkeypatch):
    begun, asked, journal = watched(monkeypatch, cut), [], Journal()

    def reward(n, **_):
        asked.append(n[0])
        raise OSError("no judge there")

    def when_it_has_ended():
        until(lambda: not any(thread.name == "rewards" for thread in threading.enumerate()))

    with pytest.raises(RewardError, match="'r' raised OSError: no judge there") as error:
        collect(cut, reward, journal, interrupt=when_it_has_ended)
    assert isinstance(error.value.__cause__, OSError)
    assert (len(begun), asked, journal) == (2, [8], {})  # the second had begun


@pytest.mark.parametrize("parts", ["one", "ahead", "afterwards"])
def test_an_interrupt_waits_for_nothing_that_is_scored_and_journals_nothing(sampler, cut, parts):
    begun, go, journal = [], threading.Event(), OfOthers() if parts == "afterwards" else Journal()

    def reward(n, **_):
        begun.append(n[0])
        assert go.wait(LIMIT)
        return [1.0] * len(n)

    def interrupt():
        if begun:
            raise Stopped

    before = {*threading.enumerate()}
    with pytest.raises(Stopped):
        collect(sampler if parts == "one" else cut, reward, journal, interrupt=interrupt)
    assert (begun, journal) == ([8], {})
    left = {*threading.enumerate()} - before
    assert left
    go.set()
    for thread in left:
        thread.join(LIMIT)
    assert (begun, journal) == ([8], {})  # those that waited do not begin
    assert collect(sampler, by_text(), journal)  # and the step goes on as if nothing had been


def test_a_signal_is_handled_while_the_last_part_is_scored(cut):
    handled = threading.Event()

    def reward(n, **_):
        if n[0] == 11:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert handled.wait(LIMIT)
        return [1.0] * len(n)

    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    try:
        collect(cut, reward)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_replay_of_parts_asks_nobody(cut):
    seen, journal = [], Journal()
    first, second = (collect(cut, by_text(seen), journal) for _ in range(2))
    assert len(seen) == P
    assert untimed(first.metrics) == untimed(second.metrics)
    assert first.metrics["rewards/r/failed"] > 0
    times = lambda experience: {name for name in experience.metrics if name.startswith("time/")}
    assert times(first) == {f"time/rewards/r/{of}_seconds" for of in ("p50", "p95", "max")}
    assert not times(second)
