import pytest

from grpo_jax.data.templates import chat, make_template, plain, qa, r1
from grpo_jax.data.tokenizer import ByteTokenizer

QUESTION = "What is {1} + {}?"  # braces are text


class FakeTokenizer:
    def render(self, messages, *, add_generation_prompt, **variables):
        turns = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return f"{variables or ''}{turns}{'<assistant>' if add_generation_prompt else ''}"


def test_published_texts():
    assert plain(QUESTION) == "What is {1} + {}?"
    assert qa(QUESTION) == "Question:\nWhat is {1} + {}?\nAnswer:\nLet's think step by step.\n"
    assert r1("1+1?") == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: 1+1? Assistant:"
    )


def test_chat():
    tokenizer = FakeTokenizer()
    assert chat(tokenizer)(QUESTION) == "<user>What is {1} + {}?</><assistant>"
    assert chat(tokenizer, system="Be brief.")("?") == "<system>Be brief.</><user>?</><assistant>"
    assert chat(tokenizer, enable_thinking=False)("?") == "{'enable_thinking': False}<user>?</><assistant>"


def test_by_name():
    tokenizer = FakeTokenizer()
    assert [make_template(name, tokenizer)("?") for name in ("plain", "qa", "r1", "chat")] == [
        "?", qa("?"), r1("?"), "<user>?</><assistant>",
    ]  # fmt: skip
    made = make_template("chat", tokenizer, instruction="Think.", system="S", date_string="today")
    assert made("1+1?") == "{'date_string': 'today'}<system>S</><user>1+1? Think.</><assistant>"


def test_instruction_follows_the_question():
    verl = 'How many? Let\'s think step by step and output the final answer after "####".'
    assert make_template("plain", instruction="gsm8k")("How many?") == verl
    assert make_template("qa", instruction="Think.")("?") == "Question:\n? Think.\nAnswer:\nLet's think step by step.\n"


def test_what_would_be_ignored_is_an_error():
    with pytest.raises(ValueError, match=r"template 'r1' has no place for {'system': 'S'}"):
        make_template("r1", system="S")
    with pytest.raises(ValueError, match=r"template 'plain' has no place for {'enable_thinking': False}"):
        make_template("plain", enable_thinking=False)


def test_unknown_name():
    with pytest.raises(ValueError, match="template='alpaca' is unknown; expected one of plain, qa, r1, chat"):
        make_template("alpaca")


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()])
def test_chat_needs_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match=f"'chat' needs a tokenizer with a chat template; {type(tokenizer).__name__}"):
        make_template("chat", tokenizer)
