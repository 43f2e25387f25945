import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.literals import Unsendable, encode, matches, plain

# NaN has a test of its own: a container that holds the same one twice is equal to itself.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters()),
    st.binary(),
)
keys = st.one_of(scalars, st.tuples(scalars, scalars), st.frozensets(st.integers()))
literals = st.recursive(
    st.one_of(scalars, st.sets(keys), st.frozensets(keys)),
    lambda parts: st.one_of(st.lists(parts), st.tuples(parts, parts), st.dictionaries(keys, parts)),
    max_leaves=20,
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
              st.sampled_from(["int", "float", "complex", "bytes", "list", "tuple", "set", "dict"])),
    lambda parts: st.one_of(st.lists(parts), st.dictionaries(st.text(), parts)), max_leaves=30,
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (None, None), (True, True), ("a", "a"), (255, ["int", "ff"]), (-1, ["int", "-1"]),
        (0.5, ["float", "0x1.0000000000000p-1"]),
        (b"\x01", ["bytes", "01"]), ([1], ["list", [["int", "1"]]]), ((), ["tuple", []]),
        ({1: "x"}, ["dict", [[["int", "1"], "x"]]]),
        ({None}, ["set", [None]]), (1j, ["complex", ["0x0.0p+0", "0x1.0000000000000p+0"]]),
    ],
)  # fmt: skip
def test_by_hand(value, sent):
    assert encode(value) == sent
    assert plain(sent) == value
    assert matches(value, sent)


@given(literals)
def test_round_trips(value):
    sent = json.loads(json.dumps(encode(value)))
    assert repr(plain(sent)) == repr(value) or plain(sent) == value  # sets have no order
    assert type(plain(sent)) is type(value)


@given(literals, literals)
def test_matching_is_equality(left, right):
    for expected, value in ((left, right), (left, left)):
        assert matches(expected, json.loads(json.dumps(encode(value)))) == (expected == value)


@given(literals, json_values)
def test_anything_else_is_refused_and_never_raises(expected, sent):
    assert matches(expected, sent) in (True, False)
    with contextlib.suppress(ValueError):
        plain(sent)


class Pretends(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [Pretends(3), [Pretends(3)], {1: Pretends(3)}, object(), len, (x for x in ()), int, range(3)]
)
def test_other_types_are_not_sent(value):
    with pytest.raises(Unsendable, match="is no literal"):
        encode(value)


def test_what_is_too_deep_or_large_is_not_sent():
    deep = circular = []
    for _ in range(100):
        deep = [deep]
    circular.append(circular)
    many: list = [0] * 10
    for _ in range(40):
        many = [many, many]
    for value in (deep, circular, many):
        with pytest.raises(Unsendable, match="deeper than 64 or more than 200000"):
            encode(value)


def test_hostile_sizes_cost_no_more_than_what_is_expected():
    colliding = ["set", [["int", f"{i * (2**61 - 1):x}"] for i in range(200_000)]]  # a set of these takes minutes
    assert not matches({1, 2}, colliding)
    assert not matches({(1, 2)}, ["set", [["tuple", colliding[1]]]])
    assert not matches({frozenset({1})}, ["set", [["frozenset", colliding[1]]]])
    assert not matches({1: 2}, ["dict", [[item, None] for item in colliding[1]]])
    assert not matches(3, colliding)
    assert not matches("3", ["int", "3"])
    assert not matches([1], ["list", 3])
    assert not matches({1: 2}, ["dict", [3]])
    assert not matches({1: 2}, ["dict", [[["list", []], 2]]])


def test_the_last_bit_counts():
    assert matches(0.1, encode(0.1))
    assert not matches(0.1, encode(math.nextafter(0.1, 1)))
    assert not matches(math.nan, encode(math.nan))
    assert matches(10**5000, encode(10**5000))
    assert not matches(10**5000, encode(10**5000 + 1))
