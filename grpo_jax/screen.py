"""What a run shows while it goes on: a progress bar on a terminal, and now and then a line where there is none."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from grpo_jax import hosts
from grpo_jax.diagnosis import diagnose

__all__ = ["Screen", "say"]


def say(text: str) -> None:
    """A line beside a progress bar; of several processes, the first speaks for all."""
    if hosts.is_first():
        tqdm.write(text)
        sys.stdout.flush()


class Screen:
    """A progress bar on a terminal, and now and then a line where there is none."""

    def __init__(self, title: str, steps: int, step: int):
        """`title` of the bar; `step` of `steps` are done."""
        self._title, self._steps = title, steps
        self._said: dict[str, int] = {}  # the step at which a diagnosis was last printed, by its name
        self._lines = max(1, min(steps // 20, 200))  # steps between lines where there is no terminal
        hidden = None if hosts.is_first() else True  # None: where there is no terminal
        self._bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=hidden, dynamic_ncols=True)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """What a row of the log says of the held-out problems, where it says anything."""
        names = sorted((name for name in row if name.startswith("eval/")), key=_by_number)
        if names:
            shown = (
                f"{name.removeprefix('eval/').replace('accuracy', 'greedy')} {_shown(name, row[name])}"
                for name in names
            )
            say(f"{self._title}: step {row['step']}, held out: {'  '.join(shown)}")

    def step(self, rows: Sequence[Mapping[str, Any]], samples: Any) -> None:
        """The last of the rows, its sampled completions, and what is to be said of it."""
        row = rows[-1]
        self._bar.set_postfix_str(_line(row), refresh=False)
        self._bar.update()
        self.evaluation(row)
        if self._bar.disable and (row["step"] % self._lines == 0 or row["step"] == 1):
            say(f"{self._title}: step {row['step']}/{self._steps}  {_line(row)}")
        for i, sample in enumerate(samples[:4]):
            prompt, completion = (_readable(sample[name]) for name in ("prompt", "completion"))
            if "\n" in prompt:  # once for all that follow
                if not i or sample["prompt"] != samples[i - 1]["prompt"]:
                    say(f"    {prompt}")
                prompt = ""
            reward = "unknown" if sample["reward"] is None else f"{sample['reward']:.2f}"
            say(f"    {prompt} -> {completion}  reward {reward}  advantage {sample['advantage']:+.2f}")
        for said in diagnose(row, rows[:-1]):
            name = said.partition(":")[0]
            again = max(self._lines, 10)  # its numbers differ every time, so that it would be said at each
            if row["step"] - self._said.get(name, -again) >= again:
                say(f"{self._title}: step {row['step']}: {said}")
                self._said[name] = row["step"]

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _readable(text: str) -> str:
    """With lines below each other, and without characters that a terminal would obey."""
    shown = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(shown).replace("\n", "\n    ")


def _line(row: Mapping[str, Any]) -> str:
    parts = {
        "reward": row.get("reward"),
        "accuracy": row.get("accuracy"),
        "kl": row.get("kl"),
        "loss": row.get("loss"),
        "length": row.get("completions/mean_length"),
    }
    text = " ".join(f"{name} {value:.3g}" for name, value in parts.items() if value is not None)
    speeds = {"rollout": row["time/rollout_tokens_per_second"], "train": row["time/train_tokens_per_second"]}
    said = " ".join(f"{name} {speed:.0f}" for name, speed in speeds.items() if speed)
    seconds = row["time/step_seconds"]
    names = ("rollout", "rewards", "reference", "update", "other")
    parts = {name: name.removesuffix("s") for name in names}
    shares = {name: row[f"time/{key}_seconds"] / seconds for name, key in parts.items()}
    split = " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    return f"{text} tok/s: {said} {seconds:.2g}s ({split})"


def _shown(name: str, value: float) -> str:
    """A share as per cents; the mean of a reward may be anything, as of a loss."""
    counts = name.endswith(("/failed", "/not_applicable"))
    return f"{value:.1%}" if _by_number(name)[0] in _SHARES and not counts else f"{value:.3g}"


_SHARES = ("eval/accuracy", "eval/pass", "eval/mean", "eval/maj")


def _by_number(name: str) -> tuple[str, int]:
    """accuracy, mean@4, mean@4/failed, mean@64, pass@1, pass@16."""
    kind, _, count = name.partition("@")
    return kind, int(count.partition("/")[0] or 0)
