"""A byte-level tokenizer that needs no file, for tiny runs."""

from collections.abc import Iterable

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """One token a byte: 0 is padding, 1 ends a completion, then the bytes of the alphabet.

    A small alphabet makes a small vocabulary, which is what a tiny model on a CPU wants.
    """

    pad_id = 0
    eos_ids = (1,)

    def __init__(self, alphabet: str | None = None):
        """`alphabet`: the characters there are; None: all 256 bytes."""
        self._bytes = bytes(range(256)) if alphabet is None else bytes(dict.fromkeys(alphabet.encode()))
        self._ids = {byte: i + 2 for i, byte in enumerate(self._bytes)}
        self.vocab_size = len(self._bytes) + 2

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end.

        Raises:
          ValueError: the text holds a byte outside the alphabet.
        """
        try:
            return [self._ids[byte] for byte in text.encode()]
        except KeyError as error:
            raise ValueError(f"{text!r} holds {bytes(error.args)!r}, outside the alphabet {self._bytes!r}.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; padding and ends are left out."""
        return bytes(self._bytes[i - 2] for i in ids if i >= 2).decode(errors="replace")
