"""A user's own reward functions, named on the command line: --reward=my_rewards.py:brevity."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from experiments import runs
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.scoring import interruptibly, score_completions
from grpo_jax.storage import Path

__all__ = ["UserRewards", "check", "check_rewards", "named", "said_of_changes"]

_FORM = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*)(=(?P<weight>.+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserRewards:
    """What `--reward` names: a section of the configuration, so that a run does not go on with other rewards."""

    functions: tuple[str, ...]  # as they were given
    digests: tuple[str, ...]  # of the files that hold them, when the run was last started

    @functools.cached_property
    def rewards(self) -> list[Reward]:
        """They themselves.

        Raises:
          RewardError: a file cannot be loaded, or does not hold what is named.
        """
        load = functools.cache(_module)  # a file that several are of runs once
        return [_reward(function, load) for function in self.functions]


def named(functions: Sequence[str]) -> dict[str, Any]:
    """The section `rewards` of a configuration, or nothing where nothing is named.

    Args:
      functions: each PLACE:NAME or PLACE:NAME=WEIGHT. PLACE is a .py file, which need not be importable, or a module,
        NAME a function or a `Reward` there, whose own name, weight, clip and dependences then count; WEIGHT is in
        place of its weight.

    Raises:
      ValueError: one is not of this form, or its file is not there.
    """
    if not functions:
        return {}
    digests = tuple(_digest(_parts(function)[0]) for function in functions)
    return {"rewards": UserRewards(functions=tuple(functions), digests=digests)}


def check_rewards(
    workdir: Path, config: Mapping[str, Any], rewards: Sequence[Reward],
    samples: Callable[[], Sequence[tuple[Prompt, str]]], tokenizer: Tokenizer, end_id: int,
) -> str:  # fmt: skip
    """What is said of rewards before training, where some are the user's own or a model: `check`, `said_of_changes`.

    Args:
      workdir: of the run.
      config: its configuration.
      rewards: all that train.
      samples: gives what `check` asks about.
      tokenizer: of the model.
      end_id: what ends a completion.

    Raises:
      RewardError: as `check`.
    """
    if "rewards" not in config and not any(reward.on_device for reward in rewards):
        return ""
    return f"{check(rewards, samples(), tokenizer, end_id)}\n{said_of_changes(workdir, config)}"


def check(rewards: Sequence[Reward], samples: Sequence[tuple[Prompt, str]], tokenizer: Tokenizer, end_id: int) -> str:
    """Asks every reward about real prompts, each with a completion that is right and with an empty one.

    Args:
      rewards: all that train, for some may depend on others.
      samples: prompts, and a right answer to each.
      tokenizer: of the model.
      end_id: what ends a completion.

    Returns:
      What they said, a line each, for the screen.

    Raises:
      RewardError: one did something wrong, before anything was trained.
    """
    texts = [text for _, answer in samples for text in (answer, "")]
    ids = [[*tokenizer.encode(text, continues=True), end_id] for text in texts]
    prompts = [prompt for prompt, _ in samples]
    try:  # where training calls them, too: in a thread
        tried = functools.partial(score_completions, rewards, prompts, ids, texts, 2)
        (scores,) = interruptibly([tried], rewards, lambda: None)
    except RewardError as error:
        raise RewardError(f"rewards, tried on a sample before training: {error}") from error.__cause__
    lines = []
    for reward in rewards:
        right, empty = (scores.by_name[reward.name][i::2].tolist() for i in (0, 1))
        of = lambda values: ", ".join("none" if x != x else f"{x:g}" for x in values)
        lines.append(
            f"reward {reward.name} x {reward.weight:g}: {of(right)} of right answers, {of(empty)} of empty ones"
        )
    return "\n".join(lines)


def said_of_changes(workdir: Path, config: Mapping[str, Any]) -> str:
    """A line for each file that is another than when the run in the workdir was started last; nothing where none is.

    Such a run goes on, for a function that raised is mended and the run continued; steps that are replayed read what
    was recorded. What was rewarded by which file, this line says.
    """
    ours = config.get("rewards")
    if ours is None or not (workdir / "config.json").exists():
        return ""
    theirs = runs.saved_configuration(workdir).get("rewards", {"functions": (), "digests": ()})
    before = dict(zip(theirs["functions"], theirs["digests"], strict=True))
    changed = {
        _parts(function)[0]: f"{before[function]} -> {digest}"
        for function, digest in zip(ours.functions, ours.digests, strict=True)
        if before.get(function, digest) != digest
    }
    return "".join(
        f"--reward: {place} has changed since the run was last started ({digests}); steps that are still to come are "
        "rewarded by what it holds now, weights included; one that was scored already needs the names of then\n"
        for place, digests in changed.items()
    )


def _parts(function: str) -> tuple[str, str, float | None]:
    """Place, name, weight."""
    match = _FORM.fullmatch(function)
    try:
        weight = None if match is None or match["weight"] is None else float(match["weight"])
    except ValueError:
        weight = math.nan
    if match is None or not math.isfinite(weight or 0):
        wrong = "" if match is None else f"{match['weight']!r} is no finite number; "
        raise ValueError(
            f"--reward={function}: {wrong}expected FILE.py:NAME or package.module:NAME, with =WEIGHT behind it if not "
            "1: --reward=my_rewards.py:brevity=0.5"
        )
    return match["place"], match["name"], weight


def _digest(place: str) -> str:
    """Of the file's content; empty for a module that has none."""
    if place.endswith(".py"):
        path = pathlib.Path(place)
        if not path.is_file():
            raise ValueError(f"--reward={place}:...: there is no file {path.absolute()}.")
    else:
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--reward={place}:...: there is no module {place} ({error}).") from None
        if spec is None:
            raise ValueError(f"--reward={place}:...: there is no module {place}; a file is named with .py at its end.")
        path = pathlib.Path(spec.origin or "")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = pathlib.Path(place).absolute()
    name = f"grpo_jax_rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _reward(function: str, load: Callable[[str], ModuleType]) -> Reward:
    place, name, weight = _parts(function)
    try:
        module = load(place)
    except (Exception, SystemExit) as error:
        raise RewardError(f"--reward={function}: {place} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if isinstance(found, Reward):
        return found if weight is None else dataclasses.replace(found, weight=weight)
    if not callable(found) or isinstance(found, type):
        there = [n for n, x in vars(module).items() if not n.startswith("_") and _is_own(x, module)]
        raise RewardError(
            f"--reward={function}: {place} has {'no' if found is None else 'another kind of'} {name}; expected a "
            f"function or a Reward. It has {', '.join(there) or 'neither'}."
        )
    return Reward(name=name, function=found, weight=1.0 if weight is None else weight)


def _is_own(x: Any, module: ModuleType) -> bool:
    return isinstance(x, Reward) or (callable(x) and getattr(x, "__module__", None) == module.__name__)
