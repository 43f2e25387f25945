"""Bytes that a device sends, of each collective in a compiled program's text, by the rings that carry them.

    all-gather of n parts of which each has S bytes in the end     S (n - 1) / n
    reduce-scatter of n arrays of S bytes                          S (n - 1) / n
    all-reduce of n arrays of S bytes                            2 S (n - 1) / n
    all-to-all of S bytes of which a device keeps one nth          S (n - 1) / n
    collective-permute of S bytes                                  S
    what TPUs hand over to be summed over n slices, of S bytes   2 S (n - 1) / n

A collective in the body of a loop counts as often as the loop goes round: by its `known_trip_count`, or the constant
that it is compared with, or by what the caller says of loops whose number of rounds is computed.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
SLICES = "slices"  # the kind of what goes from slice to slice, over the data-centre network
__all__ = ["SLICES", "Sent", "sent"]

_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")
_HANDED = re.compile(r"= \((\S+?), .*? send\(.*_xla_megascale_target=\"\{([\d,:]+)\}.*=\"ALL_REDUCE\"")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([%\w.\-, ]+)\}?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What one instruction sends."""

    kind: str
    group: int  # devices that take part together
    shape: str  # what it returns
    times: int
    bytes: float  # of a device, all times together
    line: str


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the first that runs."""
    found, name, entry = {}, None, ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
            found[name] = []
        elif name is not None:  # a line that is a brace may stand inside of a kernel's description
            found[name].append(line)
    return found, entry


def _trips(line: str, condition: list[str], body: list[str]) -> int | None:
    """Rounds of a loop, where they are known: written beside it, or from the one constant that its counter stays below.

    The counter begins at 0, and what the body adds to it is looked for: TPUs unroll the loops in which they multiply
    what they have of a matrix while they send it on.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = [match[1] for line in condition if (match := re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line))]
    if len(bounds) != 1 or not any("direction=LT" in line for line in condition):
        return None
    return -(-int(bounds[0]) // _step(condition, body))


def _step(condition: list[str], body: list[str]) -> int:
    """What the body of a loop adds to the counter that the condition reads; 1 where that is not seen."""
    counter = re.search(r"get-tuple-element\(.*\), index=(\d+)", "\n".join(condition))
    root = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(body))
    if not counter or not root:
        return 1
    named = {line.split(" = ")[0].split()[-1]: line for line in body if " = " in line}
    following = named.get(re.findall(r"%[\w.\-]+", root[1])[int(counter[1])], "")
    added = re.search(r" add\((%[\w.\-]+), (%[\w.\-]+)\)", following)
    constants = (re.search(r" constant\((\d+)\)", named.get(name, "")) for name in (added.groups() if added else ()))
    return next((int(constant[1]) for constant in constants if constant), 1)


def _times(found: dict[str, list[str]], entry: str, rounds: Sequence[int]) -> dict[str, int]:
    """How often each computation runs; loops of unknown length go `rounds[depth]` times, by how deep they lie."""
    times: dict[str, int] = collections.Counter()

    def visit(name: str, count: int, depth: int) -> None:
        times[name] += count
        for line in found.get(name, ()):
            called = {x.strip(" %") for names in _CALLED.findall(line) for x in names.split(",")}
            if " while(" not in line:
                for other in called:
                    visit(other, count, depth)
                continue
            body, condition = re.search(r"body=%?([\w.\-]+)", line), re.search(r"condition=%?([\w.\-]+)", line)
            assert body, line
            assert condition, line
            known = _trips(line, found.get(condition[1], []), found.get(body[1], []))
            visit(body[1], count * (known or rounds[depth]), depth if known else depth + 1)

    visit(entry, 1, 0)
    return times


def _shape_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape, or of a tuple of them."""
    return [
        _WIDTHS[kind] * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]


def _group(line: str) -> int:
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):  # axes, or parts: 'axis':(1)2
        sizes = {axis: int(size) for axis, size in re.findall(r"'([\w]+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    assert "source_target_pairs" in line, line
    return 0


def _slices(line: str) -> tuple[str, int] | None:
    """What the hosts are given, to be summed over how many slices."""
    if not (match := _HANDED.search(line)):
        return None
    parts = ([int(number) for number in part.split(":")] for part in match[2].split(","))
    return match[1], sum(part[-1] - part[0] + 1 for part in parts)


def sent(text: str, rounds: Sequence[int] = ()) -> list[Sent]:
    """What a device sends in a compiled program, collective by collective.

    Args:
      text: of a compiled program, `Compiled.as_text()`.
      rounds: of loops whose number of rounds is computed: of the outermost, of those inside of it, ...
    """
    found, entry = _computations(text)
    times, every = _times(found, entry, rounds), []
    for name, lines in found.items():
        for line in lines:
            if not times.get(name):
                continue
            if handed := _slices(line):
                shape, n = handed
                each = 2 * sum(_shape_bytes(shape)) * (n - 1) / n * times[name]
                every.append(Sent(kind=SLICES, group=n, shape=shape, times=times[name], bytes=each, line=line.strip()))
            if not (match := _COLLECTIVE.search(line)):
                continue
            shape, kind, start, _ = match.groups()
            sizes, n = _shape_bytes(shape), _group(line)
            # What begins a collective returns what it was given beside what it will give.
            size = max(sizes) if start and kind != "all-reduce" else sum(sizes)
            if kind == "collective-permute":
                each = float(size)
            elif kind == "reduce-scatter":
                each = size * (n - 1.0)  # it returns a part
            elif "all-reduce-scatter" in name:  # TPUs: a fusion of a sum and of what a device keeps of it
                kind, each = "reduce-scatter", size * (n - 1) / n
            else:
                each = (2 if kind == "all-reduce" else 1) * size * (n - 1) / n
            every.append(
                Sent(kind=kind, group=n, shape=shape, times=times[name], bytes=each * times[name], line=line.strip())
            )
    return every
