"""Literals as JSON: what goes into the sandbox and what comes out of it, and whether that is what was expected.

Both sides import this module; the sandboxed one has nothing but the standard library.

`encode` takes a value by its exact type: the sandboxed side cannot be made to send another value than there is, and
would win nothing by it, since it never sees what is expected. `matches` is the trusted side's: `sent` comes from a
hostile program, so it is read along the expected value, and costs no more than that one's size, and one pass.
"""

import collections
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Unsendable", "encode", "matches", "plain"]

_T = TypeVar("_T")
_MAX_DEPTH = 64  # of what is sent; far below where JSON's parsers give up
_MAX_ITEMS = 200_000  # lists that hold a list twice, and that one another twice, are short and say much
_MAX_KEY_ITEMS = 1_000  # of a key or an element of a set, which is hashed
# By `==`, dictionaries like any other, and what published solutions return.
_DICTIONARIES = frozenset({dict, collections.Counter, collections.OrderedDict, collections.defaultdict})
_SEQUENCES = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}


class Unsendable(ValueError):
    """A value that is no literal, or too large for one."""


def encode(value: Any) -> Any:
    """A value as JSON: None, bool, str and lists `[kind, content]`.

    Integers are in hexadecimal and floats too, so that the largest and the last bit arrive.

    Raises:
      Unsendable: there is something of another type in it, a subclass of these too, or it is deep, circular or large.
    """
    left = _MAX_ITEMS

    def one(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        kind = type(value)
        if depth > _MAX_DEPTH or left < 0:
            raise Unsendable(f"deeper than {_MAX_DEPTH} or more than {_MAX_ITEMS} items")
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return ["int", f"{value:x}"]
        if kind is float:
            return ["float", value.hex()]
        if kind is complex:
            return ["complex", [value.real.hex(), value.imag.hex()]]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind in _SEQUENCES:
            return [_SEQUENCES[kind], [one(item, depth + 1) for item in value]]
        if kind in _DICTIONARIES:
            return ["dict", [[one(k, depth + 1), one(v, depth + 1)] for k, v in dict.items(value)]]
        raise Unsendable(f"{kind.__module__}.{kind.__qualname__} is no literal")

    return one(value, 0)


def _content(sent: Any, *kinds: str) -> Any:
    """What stands behind one of these kinds, or None, which is no content of any."""
    if type(sent) is list and len(sent) == 2 and type(sent[0]) is str and sent[0] in kinds:
        return sent[1]
    return None


def _number(kind: str, content: Any) -> Any:
    if kind == "complex":
        real, imaginary = content
        return complex(float.fromhex(real), float.fromhex(imaginary))
    if kind == "int":
        return int(content, 16)
    return float.fromhex(content) if kind == "float" else bytes.fromhex(content)


def plain(sent: Any, items: int = _MAX_ITEMS) -> Any:
    """The value of what `encode` made.

    Raises:
      ValueError: it is nothing that `encode` makes, or holds more than `items` items.
    """
    left = items

    def one(sent: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {items} items")
        if sent is None or type(sent) in (bool, str):
            return sent
        kind, content = sent
        if kind in ("int", "float", "complex", "bytes"):
            return _number(kind, content)
        if kind == "dict":
            return {one(key): one(value) for key, value in content}
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]([one(item) for item in content])

    try:
        return one(sent)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueError(f"no literal: {type(error).__name__}") from None


def matches(expected: Any, sent: Any) -> bool:
    """Whether what was sent is `==` to the expected value, as an assertion would have it: 1 is 1.0 and True.

    Args:
      expected: a literal; trusted.
      sent: JSON, parsed; hostile.
    """
    kind = type(expected)
    if kind in (list, tuple):
        items = _content(sent, _SEQUENCES[kind])
        return _sized(items, expected) and all(map(matches, expected, items))
    if kind in (set, frozenset):
        items = _content(sent, "set", "frozenset")
        return _sized(items, expected) and _hashed(lambda: {plain(item, _MAX_KEY_ITEMS) for item in items}) == expected
    if kind is dict:
        items = _content(sent, "dict")
        if not _sized(items, expected) or not all(type(item) is list and len(item) == 2 for item in items):
            return False
        values = _hashed(lambda: {plain(key, _MAX_KEY_ITEMS): value for key, value in items})
        return (
            values is not None
            and values.keys() == expected.keys()
            and all(matches(wanted, values[key]) for key, wanted in expected.items())
        )
    if type(sent) is list and sent[:1] not in ([x] for x in ("int", "float", "complex", "bytes")):
        return False  # a container, where a scalar is expected
    try:
        return bool(plain(sent, 1) == expected)
    except ValueError:
        return False


def _sized(items: Any, expected: Any) -> bool:
    return type(items) is list and len(items) == len(expected)


def _hashed(make: Callable[[], _T]) -> _T | None:
    """A dictionary or set of what was sent, None where there can be none: as many items as expected, and none large.

    (Whoever chooses the numbers can make all of them collide, and a set of n then takes n^2 steps.)
    """
    try:
        return make()
    except (ValueError, TypeError):
        return None
