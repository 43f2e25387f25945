"""A Hugging Face directory with a tiny, untrained Qwen2, and word problems in GSM8K's format that it can learn.

python -m experiments.tiny_gsm8k --output=runs/tiny

Writes `train.jsonl`, `test.jsonl` (no question of which is in train) and `model/` (config, random weights, a tokenizer
trained on the problems). With these, experiments.sft, experiments.gsm8k and experiments.evaluate run on a laptop as
they do on a downloaded model: the README has the commands.
"""

import json
import pathlib
import random
import sys
import zlib
from collections.abc import Iterable, Iterator

import jax
import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from grpo_jax.data.templates import qa
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import TransformerConfig, init_params

OUTPUT = flags.DEFINE_string("output", None, "Where it is written; must not hold a model yet.", required=True)
TRAIN = flags.DEFINE_integer("train", 20_000, "Training problems.", lower_bound=1)
TEST = flags.DEFINE_integer("test", 512, "Test problems.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of problems and weights.")

END = "<|endoftext|>"
VOCABULARY = 512
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea")
THINGS = ("apples", "books", "coins", "cards", "shells", "pens")


def problem(rng: random.Random) -> dict[str, str]:
    """A question of two steps, and its worked answer as GSM8K writes it: a line a step, then `####`."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(10, 60), rng.randint(2, 9), rng.randint(2, 20)
    kind = rng.randrange(4)
    if kind == 0:
        text = f"{name} has {a} {things}, buys {c} more and then gives {b} away."
        steps = [(a, "+", c, a + c), (a + c, "-", b, a + c - b)]
    elif kind == 1:
        text = f"{name} has {c} boxes with {b} {things} each and {a} {things} beside them."
        steps = [(c, "*", b, c * b), (c * b, "+", a, c * b + a)]
    elif kind == 2:
        text = f"{name} has {a} {things} and loses {b}. A friend gives {name} {c}."
        steps = [(a, "-", b, a - b), (a - b, "+", c, a - b + c)]
    else:
        text = f"{name} finds {c} {things} on each of {b} days, and {a} {things} on the last day."
        steps = [(c, "*", b, c * b), (c * b, "+", a, c * b + a)]
    question = f"{text} How many {things} does {name} have now?"
    lines = [f"{x}{op}{y}={z}" for x, op, y, z in steps]
    return {"question": question, "answer": "\n".join([*lines, f"#### {steps[-1][-1]}"])}


def problems(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Problems without end; which split one belongs to is a property of its question."""
    rng = random.Random(f"{seed}/{split}")
    while True:
        made = problem(rng)
        if (zlib.crc32(made["question"].encode()) % 10 == 0) == (split == "test"):
            yield made


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with a token a digit, as Qwen's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: list[str]) -> None:
    """Writes the problems and the model."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value.")
    output, rows = pathlib.Path(OUTPUT.value), {}
    (output / "tokenizer").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN.value), ("test", TEST.value)):
        made = problems(split, SEED.value)
        rows[split] = [next(made) for _ in range(count)]
        (output / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    tokenizer = train_tokenizer(qa(row["question"]) + row["answer"] for row in rows["train"])
    tokenizer.save(str(output / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (output / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = TransformerConfig(
        vocab_size=VOCABULARY, layers=4, width=192, heads=6, kv_heads=2, head_width=32, mlp_width=576,
        qkv_bias=True, scale_embedding=False,
    )  # fmt: skip
    params, end = init_params(config, jax.random.key(SEED.value)), tokenizer.token_to_id(END)
    extra = {"eos_token_id": end, "pad_token_id": end, "max_position_embeddings": 512}
    try:
        pretrained.save(output / "model", params, config, source=output / "tokenizer", extra=extra)
    except pretrained.PretrainedError as error:
        sys.exit(f"error: {error}")
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{TRAIN.value} training and {TEST.value} test problems, and a model of {count:,} parameters: {output}")


if __name__ == "__main__":
    app.run(main)
