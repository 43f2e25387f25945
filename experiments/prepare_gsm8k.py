"""Prepares GSM8K for `tfds.data_source('gsm8k')`, without TensorFlow.

python -m experiments.prepare_gsm8k --data_dir=DIR                # downloads it
python -m experiments.prepare_gsm8k --data_dir=DIR --files=FILES  # offline, from FILES/train.jsonl and FILES/test.jsonl
"""

from absl import flags

from experiments import process
from grpo_jax.data.gsm8k import PUBLISHED, prepare

DATA_DIR = flags.DEFINE_string("data_dir", None, "Where data sets lie; left out: TFDS_DATA_DIR, ~/tensorflow_datasets.")
FILES = flags.DEFINE_string("files", None, "A directory with train.jsonl and test.jsonl; left out: download them.")


def main(argv: list[str]) -> None:
    """Prepares the data set and prints how many records each split has."""
    process.no_arguments(argv)
    counts = prepare(DATA_DIR.value, FILES.value)
    place, ours = DATA_DIR.value or "the data directory of TFDS", ", ".join(f"{n} {k}" for k, n in counts.items())
    print(f"gsm8k in {place}: {ours}" + ("" if counts == PUBLISHED else f"; GSM8K has {PUBLISHED}: is this another?"))


if __name__ == "__main__":
    process.command(main)
