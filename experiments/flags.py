"""Configuration dataclasses as absl flags: `--section.field=value`, with each field's comment as its help."""

import dataclasses
import inspect
import re
from collections.abc import Collection
from typing import Any, TypeVar

import fancyflags as ff
from absl import flags

__all__ = ["compilation_cache", "field_comments", "profile", "section"]

_C = TypeVar("_C")


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


def section(name: str, cls: type[_C], skip: Collection[str] = ()) -> "flags.FlagHolder[Any]":
    """Defines `--name.field` for every field of a frozen dataclass; the holder's value makes one."""
    holder = ff.DEFINE_auto(name, cls, help_string=(cls.__doc__ or name).splitlines()[0], skip_params=skip)
    for field, comment in field_comments(cls).items():
        if field not in skip:
            flags.FLAGS[f"{name}.{field}"].help = comment
    return holder


def profile() -> "flags.FlagHolder[str | None]":
    """Defines `--profile`, of experiments that train; `grpo_jax.profiling.steps_of` reads it."""
    return flags.DEFINE_string(
        "profile", "", "FIRST:LAST, as 3:5: the steps of which a trace is written to WORKDIR/profile; empty: none."
    )


def compilation_cache() -> "flags.FlagHolder[str | None]":
    """Defines `--compilation_cache`, of experiments that compile; `runs.cache_compilations` does what it says."""
    return flags.DEFINE_string(
        "compilation_cache",
        "auto",
        "Directory where compiled programs are kept for the next start, or off; auto: JAX_COMPILATION_CACHE_DIR where "
        "it is set, else the user's cache directory on GPUs and TPUs, and off on CPUs.",
    )
