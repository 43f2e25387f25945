"""Configuration dataclasses as absl flags: `--section.field=value`, with each field's comment as its help."""

import dataclasses
import inspect
import re
from collections.abc import Collection
from typing import Any, TypeVar

import fancyflags as ff
from absl import flags

__all__ = ["field_comments", "section"]

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
