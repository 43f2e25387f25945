"""Tokenizers as the families have them, made here: byte-level BPE and sentencepiece-like; padding."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from grpo_jax.data.tokenizer import ByteTokenizer, PretrainedTokenizer, pad

TEXTS = [
    "The café costs 5 €, naïve 😀 日本語 text.", "Solve: 3 + 4 = 7\n\nAnswer: \\boxed{7}", "Grüße, 世界! 👍🏽 ok ok",
    " leading and  double spaces ", "",
]  # fmt: skip
UNSEEN = "Żółw ñ 한국 \t{ß} 🏳️‍🌈"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}"


def byte_level():
    """As Qwen's and Llama 3's: byte-level BPE, BOS before a text (and, which is rare, EOS behind it)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
            special_tokens=["<|begin|>", "<|end|>", "<|turn|>", "<|pad|>"],
        ),
    )  # fmt: skip
    around = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("日 x", special=False, normalized=False)])
    settings = {
        "bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "__type": "AddedToken"}, "pad_token": "<|pad|>",
        "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
    }  # fmt: skip
    return tokenizer, settings


def sentencepiece(prepend=True):
    """As Gemma's (without `prepend`) and Llama 2's: spaces are ▁, and what the vocabulary lacks is bytes."""
    specials, fallback = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{i:02X}>" for i in range(256)]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, limit_alphabet=50, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = [*specials, *fallback, *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    spaces, write = (
        normalizers.Replace(" ", "▁"),
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    tokenizer.decoder = decoders.Sequence([*write, decoders.Strip(" ", 1, 0)] if prepend else write)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens(specials[:2])  # <bos> and <unk> are special by tokenizer_config.json alone
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<think>", special=False, normalized=False)])
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tokenizer, settings


def save(directory, tokenizer, settings, **files):
    """A directory as transformers saves it; `files` maps names without .json to what they hold."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in {"tokenizer_config": settings, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


KINDS = {"byte_level": byte_level, "llama 2": sentencepiece, "gemma": lambda: sentencepiece(prepend=False)}


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("tokenizer"), *KINDS[request.param]())


@pytest.fixture(scope="module")
def tokenizer(directory):
    return PretrainedTokenizer.load(directory)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return PretrainedTokenizer.load(save(tmp_path_factory.mktemp("qwen"), *byte_level()))


# Encoding and decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, UNSEEN])
def test_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.pad_id, *ids, *tokenizer.eos_ids, tokenizer.pad_id, 10**6]) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", [*TEXTS, UNSEEN, "<think> a", "a<eos>b", "<bos>a", "<|begin|>a", "<|end|><turn>a"])
def test_ids_and_text_are_those_of_transformers(directory, tokenizer, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    bos, ids = theirs.bos_token_id, theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == (ids if ids[:1] == [bos] else [bos, *ids])
    ids = theirs.encode(text)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(theirs)


def test_bos_stands_once_and_eos_never(tokenizer):
    bos = tokenizer.special_tokens["bos_token"]
    first = tokenizer.backend.token_to_id(bos)
    ids = tokenizer.encode("ok")
    assert ids[0] == first
    assert tokenizer.encode(bos + "ok") == ids  # as a rendered chat template has it
    assert tokenizer.encode("") == [first]
    assert first not in ids[1:]
    assert not set(ids) & set(tokenizer.eos_ids)


def test_a_continuation_has_nothing_before_it(tokenizer):
    text = "ok ok text"
    for cut in (0, 2, 3, 5):
        ids = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:], continues=True)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("", continues=True) == []


def test_special_tokens_are_silent_and_other_added_tokens_are_not(qwen):
    assert qwen.decode(qwen.encode("<|turn|><think>a<|end|>日 x")) == "<think>a日 x"
    turn, think = qwen.encode("<|turn|><think>", continues=True)
    assert (qwen.token_bytes[turn], qwen.token_bytes[think]) == (None, b"<think>")


def test_every_token_writes_its_bytes(tokenizer):
    for text in [*TEXTS, UNSEEN, "<think>"]:
        ids = tokenizer.encode(text, continues=True)
        assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == text
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert all(tokenizer.token_bytes[i] is None for i in (*tokenizer.eos_ids, tokenizer.pad_id))


def test_what_single_tokens_write(tmp_path, qwen):  # the alphabet of GPT-2: Ġ is a space, Ċ a line feed
    vocabulary = qwen.backend.get_vocab()
    assert [qwen.token_bytes[vocabulary[token]] for token in "ĠĊÃ"] == [b" ", b"\n", b"\xc3"]
    gemma = PretrainedTokenizer.load(save(tmp_path, *sentencepiece()))
    assert gemma.token_bytes[4 + 0xC3] == b"\xc3"  # <0xC3>
    assert gemma.token_bytes[gemma.backend.get_vocab()["▁"]] == b" "


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        (byte_level, pre_tokenizers.ByteLevel(add_prefix_space=True)),  # an option that GPT-2 has
        (sentencepiece, pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first", split=False)])),
    ],
)
def test_a_pre_tokenizer_that_puts_a_space_before_a_text(tmp_path, kind, before):
    backend, settings = kind()
    backend.normalizer, backend.pre_tokenizer = None, before
    backend.decoder = decoders.ByteLevel() if kind is byte_level else decoders.Metaspace(prepend_scheme="never")
    tokenizer = PretrainedTokenizer.load(save(tmp_path, backend, settings))
    ids = tokenizer.encode("ok ok")
    assert tokenizer.decode(ids) == " ok ok"
    assert b"".join(tokenizer.token_bytes[i] or b"" for i in ids) == b" ok ok"
    assert tokenizer.decode(tokenizer.encode("ok ok", continues=True)) == "ok ok"


def test_bytes_of_a_decoder_that_joins_words(tmp_path):
    words = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[SEP]": 2}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    tokenizer = PretrainedTokenizer.load(save(tmp_path, words, {"eos_token": "[SEP]"}))
    assert tokenizer.decode([0, 1, 2]) == "ab"
    with pytest.raises(ValueError, match=r"decoder is .*WordPiece.* stop strings need it"):
        _ = tokenizer.token_bytes


@given(data=st.data())
def test_a_stream_writes_what_decode_does(tokenizer, data):
    """Random tokens too, which are not UTF-8: what a model at a high temperature samples."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12))
    stream = tokenizer.stream()
    assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_holds_back_parts_of_a_character(tokenizer):
    ids = tokenizer.encode("ñ한ok", continues=True)
    stream = tokenizer.stream()
    pieces = [stream.add(i) for i in ids]
    assert len([piece for piece in pieces if piece]) < len(ids)
    assert "".join(pieces) == "ñ한ok"
    assert "\ufffd" not in "".join(pieces)
    half = tokenizer.stream()
    assert half.add(tokenizer.encode("ñ", continues=True)[0]) == ""
    assert half.finish() == "\ufffd"


# Directories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "files", "eos_ids", "pad_id"),
    [
        ({"eos_token": "<|end|>"}, {}, (1,), 1),  # padding is an end where nothing else is named
        ({"eos_token": "<|end|>", "pad_token": {"content": "<|pad|>"}}, {}, (1,), 3),
        ({"eos_token": "<|end|>"}, {"config": {"eos_token_id": 2}}, (2,), 2),
        (
            {"eos_token": "<|end|>"},
            {"config": {"eos_token_id": 1, "pad_token_id": 0}, "generation_config": {"eos_token_id": [2, 1, 2]}},
            (2, 1),
            0,
        ),
        ({"pad_token": "<|pad|>"}, {"generation_config": {"eos_token_id": 1, "pad_token_id": 2}}, (1,), 3),
        ({"pad_token": None}, {"generation_config": {"eos_token_id": 1, "pad_token_id": 2}}, (1,), 2),
        ({}, {"special_tokens_map": {"eos_token": "<|turn|>"}, "config": {"eos_token_id": None}}, (2,), 2),
        (
            {"eos_token": None},
            {"special_tokens_map": {"eos_token": "<|turn|>"}, "config": {"pad_token_id": -1}},
            (2,),
            2,
        ),
    ],
)
def test_ends_and_padding(tmp_path, settings, files, eos_ids, pad_id):
    tokenizer = PretrainedTokenizer.load(save(tmp_path, byte_level()[0], settings, **files))
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos_ids, pad_id)


@pytest.mark.parametrize(
    ("eos_token", "ends", "template", "end", "turn_end"),
    [
        ("<|end|>", [2, 1, 3], TEMPLATE, 1, 1),  # as Llama 3's instruct models: several, and the first is not it
        ("<|end|>", [1, 2], TEMPLATE.replace("<|end|>", "<|turn|>"), 1, 2),  # as Gemma's: a turn ends otherwise
        ("<|pad|>", [2, 1], TEMPLATE, 2, 1),  # an eos_token that ends nothing
        ("<|pad|>", [3], TEMPLATE, 3, 1),  # as Qwen's base models: the end of a turn ends nothing
        ("<|end|>", [1, 2], "{{ messages[-1].content }} {{ name }}", 1, None),  # a template that writes no end
    ],
)
def test_what_ends_a_demonstration(tmp_path, eos_token, ends, template, end, turn_end):
    settings = {"bos_token": "<|begin|>", "eos_token": eos_token, "chat_template": template}
    files = {"generation_config": {"eos_token_id": ends}}
    tokenizer = PretrainedTokenizer.load(save(tmp_path, byte_level()[0], settings, **files))
    assert (tokenizer.end_id, tokenizer.turn_end_id(name="ok")) == (end, turn_end)


def test_tokens_that_the_model_does_not_have(tmp_path):
    backend, settings = byte_level()
    last = backend.token_to_id("<think>")
    load = lambda vocab_size, **files: PretrainedTokenizer.load(save(tmp_path, backend, settings, **files), vocab_size)
    assert load(last + 1).encode("ok<think>") == [0, *load(None).encode("ok", continues=True), last]
    smaller = load(last)
    assert smaller.encode("ok", continues=True) == load(None).encode("ok", continues=True)
    for continues in (False, True):
        with pytest.raises(ValueError, match=f"needs the ids {{{last}: '<think>'}}, and the model has {last} tokens"):
            smaller.encode("ok<think>", continues=continues)
    for files in ({"eos_token_id": [1, last]}, {"eos_token_id": 1, "pad_token_id": last}):
        load(last + 1, generation_config=files)
    with pytest.raises(ValueError, match=f"and the model has {last} tokens only: tokenizer and weights do not belong"):
        load(last, generation_config={"eos_token_id": [1, last]})


def test_an_ordinary_end_is_silent_and_ordinary_padding_is_text(tmp_path):
    backend, _ = byte_level()
    end, filler = (backend.get_vocab()[token] for token in "ok")
    files = {"generation_config": {"eos_token_id": end, "pad_token_id": filler}}
    tokenizer = PretrainedTokenizer.load(save(tmp_path, backend, {}, **files))
    assert tokenizer.decode([filler, end]) == "k"
    # A token that is padding by name is silent, whatever the vocabulary says of it.
    named = PretrainedTokenizer.load(save(tmp_path, backend, {"pad_token": "<think>"}, **files))
    assert named.decode([named.pad_id, filler]) == "k"


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    backend, settings = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    ids = PretrainedTokenizer.load(save(tmp_path, backend, settings)).encode("The café costs 5")
    assert 8 < len(ids) < 64


@pytest.mark.parametrize(
    ("settings", "files", "match"),
    [
        ({}, {}, "names no token that ends a completion: set eos_token_id in generation_config.json"),
        ({"eos_token": "<nope>"}, {}, "eos_token='<nope>' .* not in the vocabulary"),
        ({"eos_token": "<|end|>", "pad_token": "<nope>"}, {}, "pad_token='<nope>' .* not in the vocabulary"),
        ({}, {"generation_config": {"eos_token_id": [1, 5000]}}, r"eos_token_id=\[1, 5000\], but 5000 is not an id"),
        ({}, {"config": {"eos_token_id": "1"}}, r"config.json has eos_token_id='1', but '1' is not an id"),
        ({"eos_token": "<|end|>"}, {"config": {"pad_token_id": -2}}, "pad_token_id=-2"),
        ({}, {"config": [1]}, "config.json holds a list; expected a JSON object"),
        (
            {"eos_token": "<|end|>", "chat_template": [{"name": "rag", "template": ""}]},
            {},
            r"has the chat templates \['rag'\]; expected one named 'default'",
        ),
    ],
)
def test_bad_directories(tmp_path, settings, files, match):
    with pytest.raises(ValueError, match=match):
        PretrainedTokenizer.load(save(tmp_path, byte_level()[0], settings, **files))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist: give a model's directory"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(FileNotFoundError, match=r"only tokenizer.model \(sentencepiece\).*convert it once"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ValueError, match=r"tokenizer.json is not JSON \(Unterminated string"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        PretrainedTokenizer.load(tmp_path)


def test_chat_templates_of_a_directory(tmp_path, qwen):
    messages = [{"role": "user", "content": "ok"}]
    assert qwen.render(messages) == "<|begin|><|turn|>ok<|end|>"
    assert qwen.encode(qwen.render(messages)) == [0, 2, *qwen.encode("ok", continues=True), 1]
    backend, settings = byte_level()
    save(tmp_path, backend, {**settings, "chat_template": "old"})
    assert PretrainedTokenizer.load(tmp_path).render(messages) == "old"
    (tmp_path / "chat_template.jinja").write_text("{{ greeting }} {{ add_generation_prompt }} é\n", encoding="utf-8")
    newer = PretrainedTokenizer.load(tmp_path)
    assert newer.render(messages, add_generation_prompt=False, greeting="hi") == "hi False é"
    assert newer.render(messages) == " True é"
    with pytest.raises(ValueError, match="no chat template"):
        PretrainedTokenizer.load(save(tmp_path / "base", backend, {"eos_token": "<|end|>"})).render(messages)


def test_loading_needs_no_jax(tmp_path):
    save(tmp_path, *byte_level())
    code = (
        "import sys; from grpo_jax.data.tokenizer import PretrainedTokenizer; "
        f"PretrainedTokenizer.load({str(tmp_path)!r}); print(sorted(sys.modules.keys() & {{'jax', 'transformers'}}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# The byte tokenizer, and padding --------------------------------------------------------------------


def test_bytes_of_the_byte_tokenizer():
    tokenizer = ByteTokenizer("ab")
    assert tokenizer.token_bytes == (None, None, b"a", b"b")
    assert tokenizer.encode("ab", continues=True) == tokenizer.encode("ab") == [2, 3]


@pytest.mark.parametrize(
    ("side", "tokens", "mask"),
    [
        ("right", [[5, 0, 0], [6, 7, 8], [0, 0, 0]], [[1, 0, 0], [1, 1, 1], [0, 0, 0]]),
        ("left", [[0, 0, 5], [6, 7, 8], [0, 0, 0]], [[0, 0, 1], [1, 1, 1], [0, 0, 0]]),
    ],
)
def test_pad(side, tokens, mask):
    padded = pad([[5], [6, 7, 8], []], 3, side)
    np.testing.assert_array_equal(padded, (tokens, mask))
    assert (padded[0].dtype, padded[1].dtype) == (np.int32, bool)
    np.testing.assert_array_equal(pad([[5]], 3)[0], pad([[5]], 3, "right")[0])


def test_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, more than the width 2"):
        pad([[1], [1, 2, 3]], 2)
