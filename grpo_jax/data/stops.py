"""Stop strings, as a table that the compiled sampler reads token by token."""

from collections.abc import Sequence

import numpy as np

__all__ = ["stop_table"]


def stop_table(token_bytes: Sequence[bytes | None], strings: Sequence[str]) -> np.ndarray:
    """Where a completion is on its way to a stop string, token by token.

    The automaton of Aho and Corasick (1975) over bytes, run over the bytes of each token from each state: a state is
    the longest end of the text that begins a stop string. A string that is completed in the middle of a token ends
    the completion at that token.

    Args:
      token_bytes: what each id writes, see `Tokenizer`.
      strings: stop strings, any of them ends a completion.

    Returns:
      [states, ids] int32: the state after token v in state s. A completion begins in state 0. The last state says that
      a stop string has been completed, by this token or before. Ids without bytes lead back to state 0.

    Raises:
      ValueError: there are no strings, or one is empty.
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings are {strings!r}; expected a list of at least one, none of them empty.")
    wanted = {string.encode() for string in strings}
    # One that contains another is never completed first. Without it, no string ends inside another's beginning.
    wanted = {string for string in wanted if not any(other in string for other in wanted - {string})}
    beginnings = sorted({string[:i] for string in wanted for i in range(len(string))}, key=lambda b: (len(b), b))
    states = {beginning: state for state, beginning in enumerate(beginnings)} | dict.fromkeys(wanted, len(beginnings))
    after = np.full((len(beginnings) + 1, 256), len(beginnings), np.int32)  # [states, byte]
    for state, beginning in enumerate(beginnings):
        for byte in range(256):
            text = beginning + bytes([byte])
            after[state, byte] = next(states[text[i:]] for i in range(len(text) + 1) if text[i:] in states)
    return _run(after, token_bytes)


def _run(after: np.ndarray, token_bytes: Sequence[bytes | None]) -> np.ndarray:
    """An automaton of bytes [states, 256] run over tokens: [states, ids]."""
    states = len(after)
    ids = np.array([i for i, token in enumerate(token_bytes) if token], np.int64)
    lengths = np.array([len(token_bytes[i] or b"") for i in ids], np.int64)
    joined = np.frombuffer(b"".join(token_bytes[i] or b"" for i in ids), np.uint8)
    starts = np.cumsum(lengths) - lengths
    # Where the first byte leads to the same state as from state 0, the whole token does: few pairs remain to be run.
    first = after[:, joined[starts]]
    differs = first != first[0]
    differs[0], differs[-1] = True, False
    before, columns = np.nonzero(differs)
    current, going = before.astype(np.int32), np.arange(len(before))
    for j in range(lengths.max(initial=0)):
        going = going[lengths[columns[going]] > j]
        current[going] = after[current[going], joined[starts[columns[going]] + j]]
    from_start = np.zeros(len(token_bytes), np.int32)
    from_start[ids] = current[: len(ids)]
    table = np.tile(from_start, (states, 1))
    table[before, ids[columns]] = current
    table[:, [i for i, token in enumerate(token_bytes) if token == b""]] = np.arange(states)[:, None]
    table[-1] = states - 1
    return table
