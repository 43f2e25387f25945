"""Tokenizers: text <-> token ids, and what a sampler needs of them (padding, ends, what each id writes)."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders

from grpo_jax import storage
from grpo_jax.data.chat import render_chat
from grpo_jax.data.token_bytes import byte_writer, fallback_byte

__all__ = ["ByteTokenizer", "DecodeStream", "PretrainedTokenizer", "Tokenizer", "pad"]

_Ids = TypeVar("_Ids", bound=Sequence[int])


class Tokenizer(Protocol):
    """What the shell needs of a tokenizer."""

    @property
    def pad_id(self) -> int:
        """What fills up rows; may be one of `eos_ids`, so masks alone say what is padding."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Any of them ends a completion."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes | None]:
        """What each id writes; None: nothing, a special token."""
        ...

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids, without an end; `continues`: the text continues another, and nothing is put before it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without padding and special tokens."""
        ...


class ByteTokenizer:
    """One token a byte: 0 is padding, 1 ends a completion, then the bytes of the alphabet.

    It needs no file, and a small alphabet makes a small vocabulary, which is what a tiny model on a CPU wants.
    """

    pad_id = 0
    eos_ids = (1,)

    def __init__(self, alphabet: str | None = None):
        """`alphabet`: the characters there are; None: all 256 bytes."""
        self._bytes = bytes(range(256)) if alphabet is None else bytes(dict.fromkeys(alphabet.encode()))
        self._ids = {byte: i + 2 for i, byte in enumerate(self._bytes)}
        self.vocab_size = len(self._bytes) + 2
        self.token_bytes: Sequence[bytes | None] = (None, None, *(bytes([byte]) for byte in self._bytes))

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of a text, without an end.

        Raises:
          ValueError: the text holds a byte outside the alphabet.
        """
        del continues  # nothing is ever put before a text
        try:
            return [self._ids[byte] for byte in text.encode()]
        except KeyError as error:
            raise ValueError(f"{text!r} holds {bytes(error.args)!r}, outside the alphabet {self._bytes!r}.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; padding and ends are left out."""
        return bytes(self._bytes[i - 2] for i in ids if i >= 2).decode(errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedTokenizer:
    """A Hugging Face tokenizer (`tokenizer.json`), by the `tokenizers` library alone. Made by `load`."""

    backend: tokenizers.Tokenizer
    continuation: tokenizers.Tokenizer  # the backend, but it puts no space before a text
    eos_ids: tuple[int, ...]
    pad_id: int
    special_tokens: Mapping[str, str]  # bos_token, eos_token, ...: variables of chat templates
    chat_template: str | None
    decoder: Mapping[str, Any] | None  # as tokenizer.json describes it
    model_vocab_size: int | None  # ids of the model, which may have fewer than the tokenizer, or more; None: unknown

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model_vocab_size: int | None = None) -> "PretrainedTokenizer":
        """Reads a directory as transformers saves it.

        `tokenizer.json`, and as far as they are there: `tokenizer_config.json`, `special_tokens_map.json`,
        `chat_template.jinja`, `generation_config.json`, `config.json`. The ends are all that generation_config names,
        else config's, else the tokenizer's `eos_token`. Padding is the tokenizer's `pad_token`, else their
        `pad_token_id`, else the first end.

        Args:
          directory: with these files.
          model_vocab_size: tokens that the model beside it has, which would take another id for its last.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: a file is not what it should be, nothing ends a completion, or an id is not in the vocabulary,
            the tokenizer's or the model's.
        """
        directory = storage.path(directory)
        if not (directory / "tokenizer.json").exists():
            raise FileNotFoundError(_no_tokenizer(directory))
        description = _read_json(directory / "tokenizer.json")
        settings = _read_json(directory / "tokenizer_config.json")
        named = {**_special_tokens(_read_json(directory / "special_tokens_map.json")), **_special_tokens(settings)}
        backend = continuation = _backend(description, named, directory)
        plain = {part: _without_prefix(description.get(part)) for part in ("normalizer", "pre_tokenizer")}
        if any(plain[part] != description.get(part) for part in plain):
            continuation = _backend({**description, **plain}, named, directory)
        eos_ids, pad_id = _ends_and_padding(directory, backend, named)
        tokenizer = cls(
            backend=backend, continuation=continuation, eos_ids=eos_ids, pad_id=pad_id, special_tokens=named,
            chat_template=_chat_template(directory, settings), decoder=description.get("decoder"),
            model_vocab_size=model_vocab_size,
        )  # fmt: skip
        tokenizer._check((*eos_ids, pad_id))
        return tokenizer

    @property
    def end_id(self) -> int:
        """The tokenizer's `eos_token`, where that ends a completion, else the first that does."""
        named = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return named if named in self.eos_ids else self.eos_ids[0]

    def turn_end_id(self, **variables: Any) -> int | None:
        """The special token that the chat template writes behind an assistant's message; None: it writes none.

        Args:
          **variables: for the chat template, as for `render`.

        Raises:
          ValueError: there is no template, or it refuses a user's message and an answer.
        """
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>"}]
        _, _, behind = self.render(messages, add_generation_prompt=False, **variables).rpartition("<answer>")
        return next((i for i in self.encode(behind, continues=True) if i in self.silent_ids), None)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids there are, added tokens among them; a model's own vocabulary may be larger."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: special tokens spelled out in it become their ids, as a rendered chat template wants.
          continues: the text continues another: nothing is put before it, neither BOS nor sentencepiece's space.

        Returns:
          Ids. Before a text stands what the tokenizer's post-processor puts there (BOS), unless the text begins with
          it already. What a post-processor puts behind a text (EOS) is left out: the model is to go on.

        Raises:
          ValueError: the text holds a token that the model does not have.
        """
        if continues:
            return self._check(self.continuation.encode(text, add_special_tokens=False).ids)
        ids, prefix = self.backend.encode(text, add_special_tokens=False).ids, self._prefix
        return self._check(ids if ids[: len(prefix)] == prefix else prefix + ids)

    def _check(self, ids: _Ids) -> _Ids:
        if self.model_vocab_size is not None and ids and max(ids) >= self.model_vocab_size:
            beyond = {i: self.backend.id_to_token(i) for i in ids if i >= self.model_vocab_size}
            raise ValueError(
                f"the tokenizer needs the ids {beyond}, and the model has {self.model_vocab_size} tokens only: "
                "tokenizer and weights do not belong together, or tokens were added without resizing the embedding. "
                "(Of padding alone: name another pad_token in tokenizer_config.json.)"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens, ends and ids that the vocabulary does not have.

        Padding goes too, as an end or a special token; a `pad_token_id` that is an ordinary token is text here.
        """
        return self.backend.decode([int(i) for i in ids if i not in self.silent_ids], skip_special_tokens=False)

    def stream(self) -> "DecodeStream":
        """A decoder of one completion, token by token."""
        return DecodeStream(self)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Messages as the model's chat template writes them, see `chat.render_chat`; `encode` takes the text.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json): is it a base model's? Write the prompt as plain text, or add a template."
            )
        variables = {**self.special_tokens, **variables}
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **variables)

    @property
    def token_bytes(self) -> Sequence[bytes | None]:
        """What each id writes; None: nothing, a special token."""
        return self._token_bytes

    @functools.cached_property
    def _token_bytes(self) -> Sequence[bytes | None]:
        """What each id writes (not always whole characters); None: a special token, or no token.

        Raises:
          ValueError: the tokenizer does not decode token by token to bytes (as WordPiece does not).
        """
        write = byte_writer(self.decoder)
        tokens = (None if i in self.silent_ids else self.backend.id_to_token(i) for i in range(self.vocab_size))
        return [None if token is None else write(token) for token in tokens]

    @functools.cached_property
    def silent_ids(self) -> frozenset[int]:
        """Ids that write nothing: special tokens and ends."""
        special = [i for i, token in self.backend.get_added_tokens_decoder().items() if token.special]
        named = [i for t in self.special_tokens.values() if (i := self.backend.token_to_id(t)) is not None]
        return frozenset([*special, *named, *self.eos_ids])

    @functools.cached_property
    def _prefix(self) -> list[int]:
        """What the post-processor puts before a text; asked, because processors come in many kinds."""
        probe = self.backend.encode("a 0 .")
        return probe.ids[: probe.sequence_ids.index(0)]


class DecodeStream:
    """The text of a completion while it grows: bytes of a character are held back until it is whole."""

    def __init__(self, tokenizer: PretrainedTokenizer):
        """Of one completion; made by `PretrainedTokenizer.stream`."""
        self._tokenizer, self._stream = tokenizer, decoders.DecodeStream()
        self._ids: list[int] = []
        self._held: list[int] = []
        self._written = 0  # characters

    def add(self, token: int) -> str:
        """What the next token adds to the text; may be empty."""
        self._ids.append(token)
        if token in self._tokenizer.silent_ids:
            return ""
        self._held.append(token)
        # A run of <0x..> tokens is decoded as one: where it is not UTF-8, all of it becomes U+FFFD, and what the
        # library's stream had written of it would be wrong (it raises then).
        if fallback_byte(self._tokenizer.backend.id_to_token(token)) is not None:
            return ""
        text = self._stream.step(self._tokenizer.backend, self._held) or ""
        self._held = []
        self._written += len(text)
        return text

    def finish(self) -> str:
        """What was held back; with it, the text is `decode` of all tokens."""
        return self._tokenizer.decode(self._ids)[self._written :]


# Reading a directory --------------------------------------------------------------------------------

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _read_json(path: storage.Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(
            f"{path} is not JSON ({error}): copy it again, it may be cut short or a Git LFS pointer."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _no_tokenizer(directory: storage.Path) -> str:
    message = f"{directory / 'tokenizer.json'} does not exist"
    if (directory / "tokenizer.model").exists():
        return (
            f"{message}, only tokenizer.model (sentencepiece), which is not read: convert it once with transformers, "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})."
        )
    return f"{message}: give a model's directory as transformers saves it."


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their role; files hold them as strings or as {"content": ...}."""
    tokens = {name: settings[name] for name in _NAMED if settings.get(name) is not None}
    return {name: token["content"] if isinstance(token, Mapping) else token for name, token in tokens.items()}


def _backend(description: dict[str, Any], named: Mapping[str, str], directory: storage.Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{directory / 'tokenizer.json'} is not a tokenizer: {error}.") from error
    backend.no_padding()
    backend.no_truncation()
    # Templates spell special tokens out: those that are only in the vocabulary must be found in a text too.
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [t for t in dict.fromkeys(named.values()) if t not in known and backend.token_to_id(t) is not None]
    )
    return backend


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space before a text (sentencepiece's, and GPT-2's option)."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [plain for step in part[name] if (plain := _without_prefix(step)) is not None]}
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**part, **{name: value for name, value in off.items() if name in part}}


def _ends_and_padding(
    directory: storage.Path, backend: tokenizers.Tokenizer, named: Mapping[str, str]
) -> tuple[tuple[int, ...], int]:
    vocabulary = frozenset(backend.get_vocab().values())

    def configured(name: str) -> list[int]:
        for path in (directory / "generation_config.json", directory / "config.json"):
            value = _read_json(path).get(name)
            if value not in (None, -1):  # old conversions of Llama write -1 where there is none
                ids = value if isinstance(value, list) else [value]
                if wrong := [i for i in ids if type(i) is not int or i not in vocabulary]:
                    raise ValueError(
                        f"{path} has {name}={value!r}, but {wrong[0]!r} is not an id of the tokenizer beside it "
                        f"({len(vocabulary)} tokens): correct it, or use the tokenizer that belongs to the model."
                    )
                return ids
        return []

    def token(name: str) -> list[int]:
        if name not in named:
            return []
        token_id = backend.token_to_id(named[name])
        if token_id is None:
            raise ValueError(f"{name}={named[name]!r} of {directory} is not in the vocabulary of tokenizer.json.")
        return [token_id]

    eos_ids = tuple(dict.fromkeys(configured("eos_token_id") or token("eos_token")))
    if not eos_ids:
        raise ValueError(
            f"{directory} names no token that ends a completion: set eos_token_id in generation_config.json, or "
            "eos_token in tokenizer_config.json."
        )
    return eos_ids, (token("pad_token") or configured("pad_token_id") or eos_ids)[0]


def _chat_template(directory: storage.Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    templates = {entry["name"]: entry["template"] for entry in template}
    if "default" not in templates:
        raise ValueError(
            f"tokenizer_config.json of {directory} has the chat templates {sorted(templates)}; expected one named "
            "'default'. Save the one you want as chat_template.jinja."
        )
    return templates["default"]


def pad(
    rows: Sequence[Sequence[int]], width: int, side: Literal["left", "right"] = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Ragged token lists as one array; zeros fill it up, and only the mask says where.

    Args:
      rows: n lists of token ids.
      width: columns, at least as many as the longest row has tokens.
      side: where the padding is.

    Returns:
      tokens [n, width] int32 and mask [n, width] bool.

    Raises:
      ValueError: a row is longer than `width`.
    """
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"row {i} has {len(row)} tokens, more than the width {width}: shorten it, or widen.")
        kept = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[i, kept], mask[i, kept] = row, True
    return tokens, mask
