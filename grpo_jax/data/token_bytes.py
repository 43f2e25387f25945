"""What a token writes, as a `tokenizer.json` describes its decoder."""

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["byte_writer", "fallback_byte"]


def _byte_alphabet() -> dict[int, str]:
    """Character of a byte-level token -> chr(byte): GPT-2's `bytes_to_unicode`, the other way."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {256 + i: chr(byte) for i, byte in enumerate(others)}


def fallback_byte(token: str | None) -> int | None:
    """The byte of a token such as <0x0A>, by which sentencepiece writes what its vocabulary lacks."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token or "")
    return int(match[1], 16) if match else None


def byte_writer(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """token -> bytes, as the decoder of a tokenizer.json writes it in the middle of a text."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        alphabet = _byte_alphabet()
        # A token with a character outside the alphabet (an added one) is written as it stands.
        return lambda token: (
            token.translate(alphabet).encode("latin-1") if {*map(ord, token)} <= alphabet.keys() else token.encode()
        )
    spaces = {
        "Metaspace": lambda s: (s["replacement"], " "),
        "Replace": lambda s: (s["pattern"].get("String"), s["content"]),
    }
    replaced = [spaces[step["type"]](step) for step in steps if step["type"] in spaces]
    # Strip takes a space off the beginning of a text, so it changes nothing in the middle.
    if not replaced or None in dict(replaced) or not kinds <= {*spaces, "ByteFallback", "Fuse", "Strip"}:
        raise ValueError(
            f"the tokenizer's decoder is {decoder}: what a single token writes is known of byte-level and "
            "sentencepiece-like ones only, and stop strings need it. Use a token that ends a turn instead."
        )

    def write(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := fallback_byte(token)) is not None:
            return bytes([byte])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return write
