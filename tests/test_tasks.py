"""Problems, judges and what the experiments share: every field changes something, and sums are worked by hand."""

import dataclasses
import importlib.util
import json
import os
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments import footprint, runs, tasks
from grpo_jax import objectives, optimizers, rollouts, sharding, training
from grpo_jax.data.tokenizer import ByteTokenizer, PretrainedTokenizer
from grpo_jax.logprobs import CHUNK
from grpo_jax.models import lora, pretrained
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from grpo_jax.sampler import Sampler
from tests.silent import silent_rollout

# The files of the fixture below, by name.
OTHER = {
    "model": {"compute_dtype": "float32", "sampler_dtype": "int8", "attention": "splash", "remat": "none"},
    "data": {"dataset": "math500", "directory": "elsewhere", "train_file": "other.jsonl", "test_file": "other.jsonl",
             "template": "r1", "instruction": "boxed", "system": "Be brief.",
             "variables": '{"mood": "!"}', "judge": "strict",
             "max_prompt_tokens": 20},
    "reward": {"format": 0.5, "overlong": 4, "repetition": -1.0},
    "evaluation": {"prompts": 1, "sampled_prompts": 1, "samples": 3, "temperature": 2.0, "top_p": 0.5,
                   "completions": 2},
}  # fmt: skip
SECTIONS = {
    "model": tasks.ModelConfig, "data": tasks.DataConfig, "reward": tasks.RewardConfig,
    "evaluation": tasks.EvaluationConfig,
}  # fmt: skip
BASE = {
    "model": {},
    "data": {"test_file": "test.jsonl", "template": "plain"},
    "reward": {},
    "evaluation": {"prompts": 3, "sampled_prompts": 3, "samples": 2, "temperature": 1.0, "completions": 4},
}
WITH_CHAT = {"template": "chat"}  # the others have no place for a system message or variables
TINY = TransformerConfig(vocab_size=16, layers=1, width=8, heads=2, kv_heads=1, head_width=8, mlp_width=12)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>{{ mood }}"


def problem(question: str, answer: str) -> dict:
    """As GSM8K publishes it, and as MATH-500 does."""
    extra = {"problem": question, "unique_id": "1", "subject": "Algebra", "level": 1}
    return {"question": question, "answer": f"so\n#### {answer}", "solution": "so", **extra}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "train.jsonl", [problem("Four and five?", "9"), problem("What are one thousand and one?", "1,001")]
    )
    write(tmp_path / "test.jsonl", [problem(f"{i} and 1?", str(i + 1)) for i in range(3)])
    write(tmp_path / "other.jsonl", [problem("Others?", "7")])
    # TFDS itself is tested with the data; here only what it is asked for.
    asked = lambda split, directory: [{"question": f"{split} of {directory}, please?", "answer": "1", "solution": "1"}]
    monkeypatch.setattr(tasks, "gsm8k_records", asked)
    return tmp_path


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> PretrainedTokenizer:
    """A token a byte, so that tokens are easily counted."""
    place = tmp_path_factory.mktemp("tokenizer")
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": CHAT}))
    return PretrainedTokenizer.load(place)


@pytest.fixture(scope="module")
def no_chat(byte_tokenizer):
    return dataclasses.replace(byte_tokenizer, chat_template=None)


def make(tokenizer, **changes) -> tasks.Task:
    return tasks.Task(tasks.DataConfig(**{**BASE["data"], **changes}), tokenizer)


def observe_model(config, tokenizer):
    policy = make_policy(dataclasses.replace(TINY, **dataclasses.asdict(config)))
    rows = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    shapes, _ = abstract_params(TINY)
    sampler = jax.tree.map(lambda x: str(x.dtype), jax.eval_shape(policy.prepare, shapes))
    return str(jax.make_jaxpr(policy.hidden)(shapes, rows, rows, rows)), jax.tree.leaves(sampler)


def observe_data(config, tokenizer):
    task = tasks.Task(config, tokenizer)
    texts = lambda prompts: [(prompt.text, dict(prompt.columns)) for prompt in prompts]
    judges = [(judge.name, judge.weight, judge.function) for judge in task.judges()]
    try:
        train = texts(task.train)
    except ValueError as error:
        train = str(error)
    return train, texts(task.test), judges, task.answer


def observe_reward(config, tokenizer):
    rewards = make(tokenizer).rewards(config, 6)
    said = ["<think>1</think><answer>2</answer>", "a b c a b c", "#### 2"]
    score = lambda reward: reward.function(["q"] * 3, said, [[1] * 5, [1] * 6, [1]], answer=["2"] * 3)
    return [(reward.name, reward.weight, score(reward)) for reward in rewards]


def observe_evaluation(config, tokenizer):
    task, asked = make(tokenizer), []

    def silent(sampler, params, prompts, prompt_ids, sampling_params, interrupt=None, limits=None):
        choice = (float(sampling_params.temperature), float(sampling_params.top_p))
        asked.append((list(prompts), sampler.group_size, choice))
        return silent_rollout(len(prompts), sampler.group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", silent)
        evaluator = task.evaluator(make_policy(TINY), sharding.make_mesh(), config, max_tokens=4, stop=(), copies=1)
        measured = sorted(evaluator.full({}))
    return asked, measured


OBSERVE = {
    "model": observe_model, "data": observe_data, "reward": observe_reward, "evaluation": observe_evaluation,
}  # fmt: skip


@pytest.mark.parametrize(("section", "field"), [(section, field) for section in OTHER for field in OTHER[section]])
def test_every_field_changes_something(section, field, byte_tokenizer):
    base = {**BASE[section], **(WITH_CHAT if field in ("system", "variables") else {})}
    observe = lambda **changes: OBSERVE[section](SECTIONS[section](**{**base, **changes}), byte_tokenizer)
    before = observe()
    assert observe() == before  # and nothing else does
    assert observe(**{field: OTHER[section][field]}) != before


def test_the_table_above_is_complete():
    # tests/test_gsm8k.py shows what evaluation.every changes, and the flags of experiments.evaluate.
    for section, config in SECTIONS.items():
        elsewhere = {"every"} if section == "evaluation" else set()
        assert {field.name for field in dataclasses.fields(config)} - elsewhere == set(OTHER[section])


# Problems and judges --------------------------------------------------------------------------------

SAID = ["#### 9", "it is 9", "#### 9 or 8", "\\boxed{9}", "nothing"]


def judged(task: tasks.Task, answer: str) -> dict[str, tuple[float, list[float]]]:
    n = len(SAID)
    score = lambda judge: judge.function([""] * n, SAID, [[1]] * n, answer=[answer] * n)
    return {judge.name: (judge.weight, score(judge)) for judge in task.judges()}


def test_gsm8k_reports_both_extractions_and_rewards_one(byte_tokenizer):
    flexible, strict = [1, 1, 0, 1, 0], [1, 0, 1, 0, 0]
    task = make(byte_tokenizer, train_file="train.jsonl")
    assert list(judged(task, "9").items()) == [("flexible", (1.0, flexible)), ("strict", (0.0, strict))]
    assert [task.answer(text) for text in SAID] == ["9", "9", "8", "9", None]
    assert [prompt.columns["answer"] for prompt in task.train] == ["9", "1001"]
    task = make(byte_tokenizer, judge="strict")
    assert list(judged(task, "9").items()) == [("strict", (1.0, strict)), ("flexible", (0.0, flexible))]
    assert [task.answer(text) for text in SAID] == ["9", None, "9", None, None]


def test_math500_and_aime_are_read_as_published_and_judged_by_the_box(byte_tokenizer, files):
    write(files / "math500.jsonl", [{
        "problem": "What is $3^2$?", "solution": "$\\boxed{9}$", "answer": "9", "subject": "Algebra", "level": 1,
        "unique_id": "test/algebra/1.json",
    }])  # fmt: skip
    write(files / "aime.jsonl", [{"ID": "2024-I-1", "Problem": "Nine?", "Solution": "It is.", "Answer": "009"}])
    for dataset, question in (("math500", "What is $3^2$?"), ("aime", "Nine?")):
        task = make(byte_tokenizer, dataset=dataset, test_file=f"{dataset}.jsonl", template="qa", instruction="boxed")
        (prompt,) = task.test
        asked = "Please reason step by step, and put your final answer within \\boxed{}."
        assert prompt.text == f"Question:\n{question} {asked}\nAnswer:\nLet's think step by step.\n"
        assert judged(task, prompt.columns["answer"]) == {"accuracy": (1.0, [0, 0, 0, 1, 0])}
        assert [task.answer(text) for text in SAID] == [None, None, None, "9", None]
        assert task.answer("\\boxed{09}") == {"math500": "09", "aime": "9"}[dataset]  # AIME's answers are integers


@pytest.mark.parametrize(("dataset", "beside"), [("gsm8k", ["flexible", "strict"]), ("math500", ["accuracy"])])
def test_math_verify_judges_what_text_does_not_tell(byte_tokenizer, monkeypatch, dataset, beside):
    task = make(byte_tokenizer, dataset=dataset, judge="math_verify")
    judges = judged(task, "9")
    assert list(judges) == ["math_verify", *beside]
    assert [weight for weight, _ in judges.values()] == [1.0, *(0.0 for _ in beside)]
    assert judges["math_verify"][1] == [1, 1, 0, 1, 0]
    (judge, *_), n = task.judges(), len(SAID)
    assert judge.function([""] * n, SAID, [[1]] * n, answer=["18/2"] * n) == [1, 1, 0, 1, 0]
    assert task.answer("\\boxed{9}") == "9"  # what is voted on stays text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"math-verify needs math_verify and antlr4: pip install 'grpo-jax\[math\]'"):
        make(byte_tokenizer, judge="math_verify")


def test_what_is_rewarded_beside_the_answer(byte_tokenizer):
    rewards = observe_reward(tasks.RewardConfig(format=0.2, overlong=4, repetition=-1.0), byte_tokenizer)
    assert rewards == [
        ("flexible", 1.0, [1, 0, 1]), ("strict", 0.0, [0, 0, 1]), ("format", 0.2, [1, 0, 0]),
        ("overlong", 1.0, [-0.75, -1, 0]), ("repetition", 1.0, [0, -0.25, 0]),  # abc bca cab abc: 3 of 4 distinct
    ]  # fmt: skip


def test_long_training_prompts_are_dropped_and_counted_and_test_prompts_never(byte_tokenizer, capsys):
    task = make(byte_tokenizer, train_file="train.jsonl", test_file="train.jsonl", max_prompt_tokens=14)
    assert [prompt.text for prompt in task.train] == ["Four and five?"]  # 14 bytes; the other has 30
    assert capsys.readouterr().out == (
        "training problems: dropped 1 of 2 prompts: 1 longer than 14 tokens (the longest has 30), 0 empty.\n"
    )
    assert [len(prompt.text) for prompt in task.test] == [14, 30]
    assert task.max_test_tokens == 32
    assert make(byte_tokenizer, train_file="train.jsonl").train[1].text == "What are one thousand and one?"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("length", "rounded"), [(1, 32), (32, 32), (33, 64)])
def test_max_test_tokens_is_the_longest_up_to_the_next_32(byte_tokenizer, files, length, rounded):
    write(files / "long.jsonl", [problem("?", "1"), problem("x" * length, "1")])
    assert make(byte_tokenizer, test_file="long.jsonl").max_test_tokens == rounded


def test_evaluation_takes_all_there_are_where_there_are_fewer(byte_tokenizer):
    asked, _ = observe_evaluation(tasks.EvaluationConfig(samples=2), byte_tokenizer)
    texts = ["0 and 1?", "1 and 1?", "2 and 1?"]
    assert sorted(asked) == [(texts, 1, (0.0, 1.0)), (texts, 2, (1.0, 1.0))]


def test_system_message_and_instruction_go_through_the_chat_template(byte_tokenizer):
    task = make(byte_tokenizer, template="chat", system="Be brief.", instruction="Go.")
    assert task.test[0].text == "<system>Be brief.<user>0 and 1? Go.<assistant>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mmlu"}, "dataset='mmlu' must be one of gsm8k, math500, aime: there is a judge for these."),
        (
            {"dataset": "aime", "test_file": "a.json", "judge": "strict"},
            "judge='strict' of dataset='aime' must be one of flexible, math_verify.",
        ),
        ({"dataset": "aime", "test_file": ""}, "dataset='aime' is read from its published file: give --data.test_file"),
        ({"judge": "human"}, "judge='human' of dataset='gsm8k' must be one of flexible, strict, math_verify."),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0 must be 1 or more."),
        ({"template": "poem"}, "template='poem' is unknown; expected one of plain, qa, r1, chat."),
        ({"system": "Be brief."}, "template 'plain' has no place for {'system': 'Be brief.'}"),
        ({"template": "chat"}, "this tokenizer has no chat template"),
        ({"test_file": "none.jsonl"}, "--data.test_file=none.jsonl is not a file: give a path, or none to read"),
        ({"train_file": "none.jsonl"}, "--data.train_file=none.jsonl is not a file"),
        ({"train_file": "tfds"}, "--data.train_file=tfds is not a file"),
        ({"dataset": "aime", "test_file": "test.jsonl"}, "test.jsonl, line 1: answer 'so"),
        ({"dataset": "math500"}, "dataset='math500' is for evaluation alone: train on gsm8k."),
        ({"max_prompt_tokens": 5}, "None is left: raise the limit"),
    ],
)
def test_bad_values_are_named(no_chat, files, changes, message):
    (files / "tfds").mkdir()

    def read():
        task = make(no_chat, **changes)
        return [prompt.text for prompts in (task.test, task.train) for prompt in prompts]

    with pytest.raises(ValueError, match=re.escape(message)):
        read()


@pytest.mark.parametrize("changes", [{"overlong": -1}, {"repetition": 0.5}])
def test_rewards_of_the_wrong_sign_are_refused(changes):
    with pytest.raises(ValueError, match=r"overlong=.* must be 0 or more, repetition=.* 0 or below"):
        tasks.RewardConfig(**changes)


def test_more_overlong_tokens_than_tokens_are_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="cache_tokens=7 must be from 1 to max_tokens=6"):
        make(byte_tokenizer).rewards(tasks.RewardConfig(overlong=7), 6)


# What the experiments share -------------------------------------------------------------------------


def test_batch_arithmetic_by_hand():
    update = training.UpdateConfig(epochs=3, minibatches=2, microbatches=2)
    rollout = rollouts.RolloutConfig(prompts=12, group_size=4)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=3, fsdp=2))
    assert footprint.batch_arithmetic(rollout, update, mesh, 99) == (
        "a step: 12 prompts x 4 = 48 completions of up to 99 tokens; 3 epochs x 2 minibatches = 6 optimizer steps of "
        "24 completions, 2 at a time on each of 6 data shards; short ones share rows"
    )
    assert "with more --update.microbatches" in footprint.batch_arithmetic(rollout, training.UpdateConfig(), mesh, 99)
    rollout = dataclasses.replace(rollout, max_waves=3)
    assert "of up to 99 tokens, in up to 3 waves; 3 epochs" in footprint.batch_arithmetic(rollout, update, mesh, 99)


def test_what_does_not_do_what_it_seems_to_is_said():
    loss, once = objectives.LossConfig(clip_low=0.1, dual_clip=3.0), training.UpdateConfig()
    assert runs.remarks(loss, once).startswith("--loss.clip_low=0.1, --loss.dual_clip=3.0: without effect")
    assert runs.remarks(loss, training.UpdateConfig(epochs=2)) == ""
    assert runs.remarks(objectives.LossConfig(kl_coef=0.5), once) == ""
    assert runs.remarks(objectives.LossConfig(kl="k1"), once).startswith("--loss.kl=k1: its expected gradient")
    for option in ("kl_in_reward", "weighted_kl"):
        assert runs.remarks(objectives.LossConfig(kl="k1", **{option: True}), once) == ""


def memory(
    config=TINY, mesh=sharding.MeshConfig(), microbatches=2, prompts=2, needs_reference=False, max_prompt_tokens=6,
    slots=0, adapters=lora.LoraConfig(), optimizer=optimizers.OptimizerConfig(),
):  # fmt: skip
    made = sharding.make_mesh(mesh)
    policy = lora.adapted_policy(make_policy(config, made), config, adapters)
    sampler = Sampler(
        policy, made, ByteTokenizer("abc"), group_size=2, max_tokens=4, max_prompt_tokens=max_prompt_tokens,
        key=jax.random.key(0), slots=slots,
    )  # fmt: skip
    return footprint.estimate(
        config, policy, made, sampler, rollout=rollouts.RolloutConfig(prompts=prompts, group_size=2, slots=slots),
        update=training.UpdateConfig(microbatches=microbatches), optimizer=optimizer,
        loss=objectives.LossConfig(kl_coef=float(needs_reference)), adapters=adapters,
    )  # fmt: skip


# While 2 prompts of 6 tokens are prefilled, their caches a second time included: `rollout_bytes`, which
# tests.test_sampler tests; and on two devices together, each of which gathers a layer's weights.
COMES_AND_GOES, ON_TWO = 3928, 5624


def test_memory_by_hand():
    # Embedding 16 x 8, norm 8; query and output 8 x 2 x 8 each, key and value 8 x 1 x 8 each, three matrices of the
    # MLP 8 x 12 each, two norms 8 each.
    params = 4 * (128 + 8 + 2 * 128 + 2 * 64 + 3 * 96 + 16)
    assert footprint.parameters(TINY) * 4 == params == 3296
    cache = lambda rows, columns: 4 * 2 * rows * columns * 8  # keys and values of one head of 8
    # 2 rows of 10 columns at a time. Of a layer: its input and that of the MLP (8 each), query and what attention gives
    # (16 each), key and value (8 each), gate and up (12 each); scores, twice.
    layer, inner, scores = 4 * 2 * 10 * 8, 4 * 2 * 10 * (8 + 32 + 16 + 24), 4 * 2 * 2 * 2 * 10 * 10
    logits = 4 * 5 * 2 * 4 * 16
    kept = 2 * 12 * 4 * 4  # ids and log-probabilities of all tokens, twice
    expected = {
        "state": 3 * params,
        "update": 2 * params + layer + inner + scores + logits,
        "rollout": params + cache(2, 6) + cache(4, 4) + COMES_AND_GOES + kept,
    }
    assert memory() == expected
    assert memory(needs_reference=True) == {**expected, "state": 4 * params}
    # Adapters of rank 2: of the query 8 x 2 and 2 x 16, of `down` 12 x 2 and 2 x 8; the reference is in the parameters.
    adapters = 4 * (16 + 32 + 24 + 16)
    adapted = memory(needs_reference=True, adapters=lora.LoraConfig(rank=2, targets=("query", "down")))
    assert adapted == {
        **expected,
        "state": params + 3 * adapters,
        "update": expected["update"] - 2 * params + 2 * adapters,
        "rollout": expected["rollout"] + 4 * 12 * 8,  # `down` and its adapter, summed up for the prefill
    }
    for remat in ("dots", "full"):  # while it is computed again all of the layer is there
        assert memory(dataclasses.replace(TINY, remat=remat)) == expected
    deep, attention = dataclasses.replace(TINY, layers=3), 4 * 2 * 10 * 16
    three = {"none": 3 * (layer + inner), "dots": 3 * (layer + inner) - 2 * attention, "full": 3 * layer + inner}
    of = lambda remat: memory(dataclasses.replace(deep, remat=remat))["update"]
    assert {of(remat) - three[remat] for remat in three} == {2 * footprint.parameters(deep) * 4 + scores + logits}
    long = memory(max_prompt_tokens=252)  # 256 columns: 128 queries at a time
    assert long["update"] == 2 * params + 256 * (layer + inner) // 10 + 4 * 2 * 2 * 2 * 128 * 256 + logits
    fused = dataclasses.replace(TINY, attention="splash")
    assert memory(fused)["update"] == expected["update"] - scores
    refilled = memory(slots=2)  # a row of each prompt, copied from where all are, and a slot for half of them
    assert refilled["rollout"] == expected["rollout"] + cache(2, 6) - cache(2, 4)
    large = memory(dataclasses.replace(TINY, vocab_size=2**22))  # 2 rows of 4 tokens: more logits than half a chunk
    assert large["update"] == 2 * large["state"] // 3 + layer + inner + scores + 2 * 4 * CHUNK


def test_memory_of_optimizers():
    wide = dataclasses.replace(TINY, vocab_size=256, width=128, head_width=128, mlp_width=192)
    given = {"adamw": {}, "adafactor": {"kind": "adafactor"}, "offloaded": {"offload": True}}
    needs = {name: memory(wide, optimizer=optimizers.OptimizerConfig(**options)) for name, options in given.items()}
    # Embedding 256 x 128; query and output 128 x 2 x 128, key and value 128 x 1 x 128, of the MLP 128 x 192; norms.
    params = 4 * (256 * 128 + 2 * 2 * 128**2 + 2 * 128**2 + 3 * 128 * 192 + 3 * 128)
    # Two of three lengths are left of a leaf, its longest or its second longest being summed up, and 1 element of what
    # it is not; norms stay.
    leaves = (256 + 128) + 4 * 2 * 128 + 2 * 2 * 128 + 3 * (128 + 192)
    factored = 4 * (leaves + 8 + 3 * (128 + 2))
    assert [needs[name]["state"] for name in given] == [3 * params, params + factored, params]
    # Moments are brought over where activations were, which here are less.
    assert needs["offloaded"]["update"] == 2 * params + 2 * params
    assert needs["adamw"]["update"] == needs["adafactor"]["update"] < 4 * params
    assert len({bytes_of["rollout"] for bytes_of in needs.values()}) == 1
    policy, shapes = make_policy(wide), abstract_params(wide)[0]
    copies = lambda loss, **options: footprint.copies_held(policy, shapes, optimizers.OptimizerConfig(**options), loss)
    assert copies(None) == copies(objectives.LossConfig(kl_coef=0.0)) == 3
    assert copies(objectives.LossConfig(kl_coef=0.1), offload=True) == 2


def test_memory_is_split_over_the_mesh_and_the_sampler_is_halved_by_bfloat16():
    whole = memory()
    split = memory(mesh=sharding.MeshConfig(fsdp=2))
    assert split["state"] * 2 == whole["state"]  # every leaf has the model's width
    halves = (4 * 2 * 8) * (1 * 6 + 2 * 4) + COMES_AND_GOES - ON_TWO // 2 + 192  # all but weights
    assert split["rollout"] == whole["rollout"] - halves
    copies = memory(mesh=sharding.MeshConfig(data=2))
    assert copies["state"] == whole["state"]
    halved = memory(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    assert halved["state"] == whole["state"]
    kept = 2 * 3 * 8 + 192  # three norms stay as they are, and what is returned, and some of what comes and goes
    cast = 2 * (2 * 128 + 2 * 64 + 3 * 96 + 16)  # a layer's weights, for the prefill
    assert kept < halved["rollout"] - whole["rollout"] // 2 < kept + COMES_AND_GOES // 2 + cast


def test_more_microbatches_never_need_more_but_for_the_sum_of_gradients_that_two_begin():
    for config in (TINY, dataclasses.replace(TINY, remat="full", layers=3)):
        for mesh in (sharding.MeshConfig(), sharding.MeshConfig(fsdp=2, tensor=2)):
            needed = [memory(config, mesh, microbatches, prompts=8) for microbatches in (1, 2, 4, 8, 16)]
            gradients = needed[0]["state"] // 3
            whole, *parts = [bytes_of["update"] for bytes_of in needed]
            assert whole + gradients > parts[0] > parts[2]
            assert parts == sorted(parts, reverse=True)
            assert len({(bytes_of["state"], bytes_of["rollout"]) for bytes_of in needed}) == 1


def test_memory_line_warns_where_it_will_hardly_fit(monkeypatch):
    def line(limit, platform="tpu"):
        stats = lambda: None if limit is None else {"bytes_limit": limit}
        device = types.SimpleNamespace(memory_stats=stats, platform=platform)
        monkeypatch.setattr(jax, "local_devices", lambda: [device] * 4)
        return footprint.line({"state": 4 * 2**30, "update": 2 * 2**30, "rollout": 3 * 2**30})

    said = "memory a device, estimated: 7.00 GiB (state 4.00 GiB, update 2.00 GiB, rollout 3.00 GiB)"
    assert line(None) == said
    assert line(7 * 2**30) == f"{said} of 7.00 GiB"
    assert line(6 * 2**30).startswith(f"{said} of 6.00 GiB; this will hardly fit: more --update.microbatches")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**21}.get)  # 8 GiB of four devices
    assert line(None, "cpu").startswith(f"{said} of 2.00 GiB; this will hardly fit")


def test_attention_that_these_devices_do_not_have():
    runs.check_attention(TINY)
    for attention, needed in (("splash", "tpu"), ("cudnn", "gpu")):
        with pytest.raises(ValueError, match=f"attention={attention} needs a {needed}, and this is a cpu"):
            runs.check_attention(dataclasses.replace(TINY, attention=attention))


def test_a_state_that_these_devices_cannot_leave_to_the_host():
    offload, mesh = optimizers.OptimizerConfig(offload=True), sharding.make_mesh()
    runs.check_offload(optimizers.OptimizerConfig(), mesh)
    with pytest.raises(ValueError, match=r"--optimizer.offload: this is a cpu, whose memory is the host's"):
        runs.check_offload(offload, mesh)
    memories = lambda *kinds: lambda: [types.SimpleNamespace(kind=kind) for kind in kinds]
    device = types.SimpleNamespace(platform="gpu", device_kind="Old", addressable_memories=memories("device"))
    other = types.SimpleNamespace(local_devices=[device])
    with pytest.raises(ValueError, match=r"--optimizer.offload needs pinned_host memory, which Old has not"):
        runs.check_offload(offload, other)
    device.addressable_memories = memories("device", "pinned_host")
    runs.check_offload(offload, other)


def test_a_chat_template_that_writes_todays_date_must_be_fixed(byte_tokenizer):
    dated = dataclasses.replace(byte_tokenizer, chat_template="{{ date_string or strftime_now('%d') }}")
    chat: dict[str, Any] = {"test_file": "test.jsonl", "template": "chat"}
    with pytest.raises(ValueError, match="writes today's date"):
        tasks.Task(tasks.DataConfig(**chat), dated)
    assert tasks.Task(tasks.DataConfig(**chat, variables='{"date_string": "1 May"}'), dated).test[0].text == "1 May"
    with pytest.raises(ValueError, match="must be a JSON object"):
        tasks.Task(tasks.DataConfig(**chat, variables="[]"), dated)


def test_demonstrations_end_as_the_template_does(byte_tokenizer):
    (end,) = byte_tokenizer.eos_ids
    turn_end = 5
    special = {**byte_tokenizer.special_tokens, "sep_token": byte_tokenizer.backend.id_to_token(turn_end)}
    template = "{{ messages[-1].content }}{{ sep_token }}"
    both = dataclasses.replace(
        byte_tokenizer, chat_template=template, special_tokens=special, eos_ids=(end, turn_end)
    )  # fmt: skip
    make = lambda template, tokenizer: tasks.Task(tasks.DataConfig(test_file="f", template=template), tokenizer)
    assert (make("qa", both).end_id, make("chat", both).end_id) == (end, turn_end)
    silent = dataclasses.replace(both, chat_template="{{ messages[-1].content }}")
    assert make("chat", silent).end_id == end
    endless = dataclasses.replace(both, eos_ids=(end,))
    assert make("qa", endless).end_id == end
    with pytest.raises(ValueError, match=rf"set eos_token_id in the model's generation_config.json to \[{end}, 5\]"):
        make("chat", endless)


@pytest.mark.parametrize(
    ("vocab_size", "policy", "message"),
    [
        (256, {}, "the model has 256 tokens only"),
        (257, {"attention": "splash"}, "--policy.attention=splash needs a tpu"),
        (257, {}, None),
    ],
)
def test_a_model_that_cannot_do_what_is_asked(byte_tokenizer, tmp_path, vocab_size, policy, message):
    (tmp_path / "tokenizer").mkdir()
    byte_tokenizer.backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    ends = {"eos_token_id": byte_tokenizer.eos_ids[0], "pad_token_id": 256}
    config = dataclasses.replace(TINY, vocab_size=vocab_size, scale_embedding=False)
    params = init_params(config, jax.random.key(0))
    pretrained.save(tmp_path / "model", params, config, source=tmp_path / "tokenizer", extra=ends)
    sections = {
        "mesh": sharding.MeshConfig(), "policy": tasks.ModelConfig(**policy), "data": tasks.DataConfig(test_file="f"),
    }  # fmt: skip
    if message is None:
        assert tasks.Opened(tmp_path / "model", sections).model.vocab_size == vocab_size
    else:
        with pytest.raises(ValueError, match=message):
            tasks.Opened(tmp_path / "model", sections)


@pytest.mark.parametrize("name", ["model", "model/below", "../run/model"])
def test_a_model_is_not_taken_for_what_a_start_has_left(tmp_path, name):
    workdir = tmp_path / "run"
    (workdir / "model" / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--model=.* lies where a run in --workdir=.*run keeps what it was given"):
        runs.description(workdir / name, workdir)
    assert runs.description(tmp_path / "model", workdir) == tmp_path / "model"


def test_what_a_failed_start_left_is_not_kept(tmp_path, monkeypatch):
    workdir, config = tmp_path / "run", {"model": str(tmp_path / "second")}
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text(name)
        runs.keep_description(tmp_path / name, workdir)
    kept = workdir / "model" / "tokenizer.json"
    assert kept.read_text() == "second"
    assert runs.description(tmp_path / "second", workdir) == tmp_path / "second"
    monkeypatch.setattr(runs, "begun", lambda workdir: True)
    runs.keep_description(tmp_path / "first", workdir)
    assert kept.read_text() == "second"
    assert runs.description(tmp_path / "second", workdir) == workdir / "model"
    assert runs.description(tmp_path / "first", workdir) == tmp_path / "first"  # open_workdir will refuse it
