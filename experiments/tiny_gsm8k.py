"""A Hugging Face directory with a tiny, untrained Qwen2, and word problems in GSM8K's format that it can learn.

python -m experiments.tiny_gsm8k --output=runs/tiny

Writes `train.jsonl`, `test.jsonl` (no question of which is in train) and `model/` (config, random weights, a tokenizer
trained on the problems, or on a text of yours). With these, experiments.sft, experiments.gsm8k and experiments.evaluate
run on a laptop as they do on a downloaded model: the README has the commands.
"""

import itertools
import json
import pathlib
import random
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator

import jax
import tokenizers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments import footprint, process, runs
from grpo_jax.data.gsm8k import gsm8k_record
from grpo_jax.data.sources import json_records
from grpo_jax.data.templates import qa
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import TransformerConfig, init_params
from grpo_jax.storage import Path

OUTPUT = flags.DEFINE_string("output", None, "Where it is written; must not hold a model yet.", required=True)
TRAIN = flags.DEFINE_integer("train", 20_000, "Training problems.", lower_bound=1)
TEST = flags.DEFINE_integer("test", 512, "Test problems.", lower_bound=1)
TOKENIZER_FILE = flags.DEFINE_string(
    "tokenizer_file",
    None,
    "Problems in GSM8K's format to train the tokenizer on, as GSM8K's train.jsonl; left out: those made.",
)
VOCABULARY = flags.DEFINE_integer("vocabulary", 512, "Tokens, if the text has so many.", lower_bound=300)
SEED = flags.DEFINE_integer("seed", 0, "Of problems and weights.")

END = "<|endoftext|>"
WORKED = 0.5  # of the answers show their steps
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea")
THINGS = ("apples", "books", "coins", "cards", "shells", "pens")


def problem(rng: random.Random) -> dict[str, str]:
    """A question of two steps, and its answer as GSM8K writes it: a line a step, then `####`; or that line alone.

    What has learned from both kinds of answer gives both. That the steps pay, only the reward can tell.
    """
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
    lines = [f"{x}{op}{y}={z}" for x, op, y, z in steps] if rng.random() < WORKED else []
    return {"question": question, "solution": "\n".join([*lines, f"#### {steps[-1][-1]}"])}


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
        vocab_size=VOCABULARY.value, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_model(directory: Path, tokenizer: tokenizers.Tokenizer) -> TransformerConfig:
    """An untrained Qwen2 and its tokenizer, where there is nothing yet."""
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), layers=4, width=192, heads=6, kv_heads=2, head_width=32,
        mlp_width=576, qkv_bias=True, scale_embedding=False,
    )  # fmt: skip
    params, end = init_params(config, jax.random.key(SEED.value)), tokenizer.token_to_id(END)
    extra = {"eos_token_id": end, "pad_token_id": end, "max_position_embeddings": 512}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    with tempfile.TemporaryDirectory() as source:
        tokenizer.save(f"{source}/tokenizer.json")
        pathlib.Path(source, "tokenizer_config.json").write_text(json.dumps(settings))
        pretrained.save(directory, params, config, source=source, extra=extra)
    return config


def main(argv: list[str]) -> None:
    """Writes the problems and the model."""
    output, made = runs.directory_of(argv, OUTPUT), {}
    for split, count in (("train", TRAIN.value), ("test", TEST.value)):
        made[split] = list(itertools.islice(problems(split, SEED.value), count))
    try:
        records = json_records(TOKENIZER_FILE.value, gsm8k_record) if TOKENIZER_FILE.value else made["train"]
        tokenizer = train_tokenizer(qa(record["question"]) + record["solution"] for record in records)
        config = write_model(output / "model", tokenizer)
    except ValueError as error:  # what the file holds; a model that is there
        sys.exit(f"error: {error}")
    for split, records in made.items():
        lines = (json.dumps({"question": r["question"], "answer": r["solution"]}) + "\n" for r in records)
        (output / f"{split}.jsonl").write_text("".join(lines))
    print(
        f"{TRAIN.value} training and {TEST.value} test problems, and a model of {footprint.parameters(config):,} "
        f"parameters with {config.vocab_size} tokens: {output}"
    )


if __name__ == "__main__":
    process.command(main)
