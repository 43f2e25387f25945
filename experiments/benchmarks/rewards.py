"""How many items a second the pool of rewards judges, and what it adds to an item, beside calls in this process.

python -m experiments.benchmarks.rewards [--items=2000] [--group=8] [--workers=2]

Short items of mathematics, whose answers are all distinct, each gold answer for a group of them.

- Judged in this process, and so neither by math-verify nor by a worker: `numbers`, plain ones, and `short` ones
  (3/4, x=5, 12%, 3 sqrt(2)).
- Judged by math-verify in a worker: `units` and the like (10 cm, 2.5%), which it has to read; `expressions` (x=0.5,
  polynomials), which SymPy simplifies too; `repeated` are units of which a group has one answer, read once for all.
- `known` are the repeated ones in a second call, which are remembered; `empty` items do nothing: what the pool costs.

So the speeds of the first and the last say nothing about math-verify's. Needs `.[math]`.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks import measure
from grpo_jax.rewards.concurrent import arguments_of_each
from grpo_jax.rewards.mathematics import MathVerify
from grpo_jax.rewards.pool import Pool, pooled

MODULE = "experiments.benchmarks.rewards"
KINDS = ("numbers", "short", "units", "expressions", "repeated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Options):
    """Sizes."""

    items: int = 2000  # completions a turn
    group: int = 8  # completions that have one gold answer
    workers: int = 2  # processes

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.items, self.group, self.workers) < 1:
            raise ValueError(f"items={self.items}, group={self.group} and workers={self.workers} must be 1 or more.")


def empty(*, completion: str, **_: Any) -> float:
    """An item that costs nothing."""
    return float(len(completion))


def _in_process(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> list[float]:
    return [empty(**item) for item in arguments_of_each(prompts, completions, completion_ids, {})]


def _text(kind: str, form: int, rng: random.Random) -> str:
    """An answer that nobody has given before, most likely."""
    a, b, c = (rng.randrange(1, 10**6) for _ in range(3))
    forms = {
        "numbers": (f"{a * 1000 + b % 1000:,}", f"{a}.{b}", rf"-\frac{{{b}}}{{{c}}}"),
        "short": (rf"\frac{{{a}}}{{{b}}}", f"x={a}", rf"{a}\%", rf"{a}\sqrt{{{1 + b % 9999}}}"),
        "units": (rf"{a}\text{{ cm}}", rf"{a}.{b}\%", rf"{a}^\circ"),
        "expressions": (f"x={a}.{b}", f"x^2+{a}x-{b}"),
    }[kind]
    return forms[form % len(forms)]


def problems(kind: str, options: Options, seed: int) -> tuple[list[str], list[str]]:
    """Completions and gold answers, of one form in a group, of which one is right, or all where they are `repeated`."""
    rng, repeated = random.Random(f"{kind} {seed}"), kind == "repeated"
    kind = "units" if repeated else kind
    groups = [_text(kind, group, rng) for group in range(-(-options.items // options.group))]
    golds = [groups[i // options.group] for i in range(options.items)]
    right = lambda i: repeated or i % options.group == 0
    answers = [gold if right(i) else _text(kind, i // options.group, rng) for i, gold in enumerate(golds)]
    return [rf"So it is $\boxed{{{answer}}}$." for answer in answers], golds


def _rate(function: Callable[..., Sequence[Any]], completions: Sequence[str], **columns: Sequence[str]) -> float:
    n = len(completions)
    seconds, judged = measure.seconds(
        lambda: function(prompts=["p"] * n, completions=completions, completion_ids=[[1]] * n, **columns)
    )
    if None in judged:
        raise RuntimeError(f"{list(judged).count(None)} of {n} items got no verdict.")
    return n / seconds


def run(options: Options) -> dict[str, Any]:
    """Items a second of every kind, turn by turn with other answers each, and of empty ones in and out of workers."""
    turn = iter(range(10**6))
    with Pool(options.workers, on_failure="none") as pool:
        reward, nothing = MathVerify(pool), pooled(f"{MODULE}:empty", pool)
        texts = [f"{i}" for i in range(options.items)]

        def ours() -> dict[str, float]:
            seed = options.seed + next(turn)
            asked = {kind: problems(kind, options, seed) for kind in KINDS}
            asked["known"] = asked["repeated"]
            rates = {f"{kind}_per_second": _rate(reward, texts, answer=golds) for kind, (texts, golds) in asked.items()}
            return {**rates, "empty_per_second": _rate(nothing, texts)}

        in_process = lambda: {"empty_per_second": _rate(_in_process, texts)}
        measured = measure.turns({"ours": ours, "in process": in_process}, options.rounds)
    costs = [1 / rate for rate in measured["ours"]["empty_per_second"]]
    note = (
        f"an item that does nothing takes {1e6 * sorted(costs)[len(costs) // 2]:.0f} microseconds in a pool of "
        f"{options.workers} workers."
    )
    return measure.report(MODULE, options, measured, notes=[note])


if __name__ == "__main__":
    measure.command(Options, run)
