"""Configuration dataclasses as absl flags: `--section.field=value`, with each field's comment as its help."""

import dataclasses
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import fancyflags as ff
from absl import flags
from jax.sharding import Mesh

__all__ = [
    "Section",
    "check_debugging",
    "check_distinct",
    "compilation_cache",
    "debug_nans",
    "deterministic",
    "distributed",
    "field_comments",
    "parsed",
    "profile",
    "rewards",
    "section",
    "seeds_of",
]

_C = TypeVar("_C")

# What the flags of TRL and verl are called here.
_ELSEWHERE = {
    "beta": "kl_coef", "gradient_accumulation_steps": "microbatches", "kl_loss_coef": "kl_coef", "lr": "learning_rate",
    "max_completion_length": "max_tokens", "max_grad_norm": "clip_norm", "max_prompt_length": "max_prompt_tokens",
    "max_response_length": "max_tokens", "max_steps": "steps", "model_name_or_path": "model", "n": "group_size",
    "num_generations": "group_size", "num_iterations": "epochs", "output_dir": "workdir",
    "total_training_steps": "steps",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Section(Generic[_C]):
    """The flags of a configuration."""

    _cls: Callable[..., _C]
    _values: Mapping[str, Any]  # by field, as the command line has them

    @property
    def value(self) -> Callable[..., _C]:
        """Makes the configuration."""
        return functools.partial(self._cls, **self._values)


def field_comments(cls: type[Any]) -> dict[str, str]:
    """The comment behind each field of a dataclass, its bases' included."""
    comments: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): [^#]*#\s*(.+)", line):
                comments[match[1]] = match[2]
            elif (match := re.match(r"    (\w+): ", line)) and match[1] not in comments:
                comments[match[1]] = match[1].replace("_", " ")
    return comments


def section(name: str, cls: type[_C], skip: Collection[str] = ()) -> Section[_C]:
    """Defines `--name.field` for every field of a frozen dataclass.

    Not `ff.DEFINE_auto`, which also takes the flag `--name` for itself.
    """
    values = ff.define_flags(name, ff.auto(cls, skip_params=skip))
    for field, comment in field_comments(cls).items():
        if field not in skip:
            flags.FLAGS[f"{name}.{field}"].help = comment
    return Section(cls, values)


def parsed(argv: Sequence[str]) -> list[str]:
    """For absl's `app.run`: what a command line has beside its flags. A mistake in them is a line, and the end."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = [f"--{name}" for name in _near(error.flagname)]
        meant = f"; did you mean {' or '.join(near[:5])}{', or another' if near[5:] else ''}?" if near else "."
        sys.exit(f"error: there is no flag --{error.flagname}{meant} --help shows those there are.")
    except flags.Error as error:
        # absl: flag --workdir=None: Flag --workdir must have a value other than None.
        missing = [f"--{name}=" for name in re.findall(r"^flag --(\S+)=None: ", str(error), re.MULTILINE)]
        required = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required; --help says what for."
        sys.exit(f"error: {required if missing else error}")


def _near(unknown: str) -> list[str]:
    """Flags that may have been meant: --prompts and --group are in a section, and --mesh is one."""
    names, field = sorted(flags.FLAGS), unknown.rpartition(".")[2]
    field = _ELSEWHERE.get(field, field)
    in_sections = [name.partition(".") for name in names if "." in name]
    alike = difflib.get_close_matches(field, {of for *_, of in in_sections}, cutoff=0.8)
    found = lambda meant: [f"{section}.{of}" for section, _, of in in_sections if meant(section, of)]
    return (
        [field] * (field in flags.FLAGS)
        or found(lambda section, of: field == of or unknown == section)
        or found(lambda section, of: of.startswith(f"{field}_"))
        or difflib.get_close_matches(unknown, names, cutoff=0.8)
        or found(lambda section, of: of in alike)
    )


def profile() -> "flags.FlagHolder[str | None]":
    """Defines `--profile`, of experiments that train; `grpo_jax.profiling.steps_of` reads it."""
    return flags.DEFINE_string(
        "profile", "", "FIRST:LAST, as 3:5: the steps of which a trace is written to WORKDIR/profile; empty: none."
    )


def deterministic() -> "flags.FlagHolder[bool]":
    """Defines `--deterministic`, of experiments that train; `process.make_deterministic` does what it says."""
    return flags.DEFINE_bool(
        "deterministic", False, "On GPUs, only kernels that give the same bits every time, and the same ones in every "
        "process of the run. It costs speed (docs/performance.md), and "
        "changes nothing elsewhere, where runs repeat anyway.",
    )  # fmt: skip


def debug_nans() -> "flags.FlagHolder[bool]":
    """Defines `--debug_nans`, of experiments that train; `check_debugging` says where it does not work."""
    return flags.DEFINE_bool(
        "debug_nans", False, "Stop at the first update that is not finite, and name the operation that made the first "
        "NaN, with its file and line. On one device; slow, and it takes twice the memory.",
    )  # fmt: skip


def check_debugging(asked: bool, mesh: Mesh) -> None:
    """Raises ValueError where NaNs are to be named on a mesh of several devices."""
    if asked and mesh.size > 1:
        raise ValueError(f"--debug_nans works on one device, and the mesh has {mesh.size}: leave out --mesh.")


def distributed() -> "flags.FlagHolder[str | None]":
    """Defines `--distributed`, of experiments that run on several hosts; `grpo_jax.hosts.initialize` reads it."""
    return flags.DEFINE_string(
        "distributed", "off", "auto: one of the processes of a TPU pod slice, a Slurm or an MPI job; elsewhere "
        "HOST:PORT,PROCESS,COUNT: where the first one is, which this is, from 0, and how many; off: the only one.",
    )  # fmt: skip


def rewards() -> "flags.FlagHolder[list[str]]":
    """Defines `--reward`, of experiments with a reward; `user_rewards.named` reads it."""
    return flags.DEFINE_multi_string(
        "reward", [], "FILE.py:NAME or package.module:NAME, a function or a Reward of your own, which counts too; with "
        "=WEIGHT behind it, if not 1. Can be given several times.",
    )  # fmt: skip


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raises ValueError unless a list of this name holds something, and nothing twice."""
    if not values or len({*values}) < len(values) or "" in values:
        given = ",".join(map(str, values))
        raise ValueError(f"--{name}={given} must name at least one, and none of them twice.")


def seeds_of(given: Sequence[str]) -> list[int]:
    """What `--seeds` names; ValueError where that are no integers, or one twice."""
    try:
        seeds = [int(seed) for seed in given]
    except ValueError as error:
        raise ValueError(f"--seeds={','.join(given)} must be integers: --seeds=0,1,2.") from error
    check_distinct("seeds", seeds)
    return seeds


def compilation_cache() -> "flags.FlagHolder[str | None]":
    """Defines `--compilation_cache`, of experiments that compile; `process.cache_compilations` does what it says."""
    return flags.DEFINE_string(
        "compilation_cache",
        "auto",
        "Directory where compiled programs are kept for the next start, or off; auto: JAX_COMPILATION_CACHE_DIR where "
        "it is set, else the user's cache directory on GPUs and TPUs, and off on CPUs.",
    )
