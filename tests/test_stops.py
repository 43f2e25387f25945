import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.stops import stop_table
from grpo_jax.data.tokenizer import ByteTokenizer


def first_stop(token_bytes, strings, ids):
    """The oracle: the first token after which the bytes since the last silent token hold a stop string."""
    text = b""
    for n, i in enumerate(ids):
        token = token_bytes[i] if i < len(token_bytes) else None
        text = b"" if token is None else text + token
        if any(string.encode() in text for string in strings):
            return n
    return None


PIECES = st.text("ab\né", min_size=1, max_size=5)


@given(
    tokens=st.lists(st.none() | st.binary(max_size=0) | PIECES.map(str.encode), min_size=1, max_size=12),
    strings=st.lists(PIECES, min_size=1, max_size=4),
    data=st.data(),
)
def test_stops_where_the_bytes_first_hold_a_string(tokens, strings, data):
    table = stop_table(tokens, strings)
    ids = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=30))
    states = [0]
    for i in ids:
        states.append(table[states[-1], i])
    stopped = [n for n, state in enumerate(states[1:]) if state == len(table) - 1]
    first = first_stop(tokens, strings, ids)
    assert stopped == ([] if first is None else list(range(first, len(ids))))


def test_a_table_by_hand():
    # States: 0 nothing, 1 "a", 2 "aa", 3 done ("aab").
    table = stop_table([b"a", b"b", b"aabc", None, b"ba", b""], ["aab"])
    assert table.dtype == np.int32
    np.testing.assert_array_equal(
        table, [[1, 0, 3, 0, 1, 0], [2, 0, 3, 0, 1, 1], [2, 3, 3, 0, 3, 2], [3, 3, 3, 3, 3, 3]]
    )
    # "axb" contains "xb" and therefore adds nothing.
    np.testing.assert_array_equal(stop_table([b"x", b"b"], ["axb", "xb"]), stop_table([b"x", b"b"], ["xb"]))


def test_a_character_split_over_tokens_completes_a_string():
    tokenizer = ByteTokenizer()  # every token is a byte
    table = stop_table(tokenizer.token_bytes, ["ñ한", "</answer>"])
    state, done = 0, []
    for i in tokenizer.encode("ok ñ한"):
        state = table[state, i]
        done.append(state == len(table) - 1)
    assert done == [False] * (len(done) - 1) + [True]


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "ab"])
def test_stop_strings_that_are_none(strings):
    with pytest.raises(ValueError, match="expected a list of at least one, none of them empty"):
        stop_table([b"a"], strings)
