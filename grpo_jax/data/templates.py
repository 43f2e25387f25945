"""Templates: functions from a question to the text that the model reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["INSTRUCTIONS", "Renderer", "Template", "chat", "make_template", "plain", "qa", "r1"]

Template = Callable[[str], str]

# What may follow a question, by name.
INSTRUCTIONS = {
    # verl's for GSM8K (examples/data_preprocess/gsm8k.py): the answer format of the data set itself.
    "gsm8k": 'Let\'s think step by step and output the final answer after "####".',
    # Qwen2.5-Math's, for rewards that look for a box.
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
}


class Renderer(Protocol):
    """What `chat` needs of a tokenizer: a chat template."""

    def render(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
        """The text of a conversation; `variables` reach the chat template."""
        ...


def plain(question: str) -> str:
    """The question alone."""
    return question


def qa(question: str) -> str:
    """The simple prompt for base models too small to follow instructions (SimpleRL-Zoo, arXiv 2503.18892)."""
    return f"Question:\n{question}\nAnswer:\nLet's think step by step.\n"


def r1(question: str) -> str:
    """The think/answer template of DeepSeek-R1-Zero (arXiv 2501.12948, table 1).

    The table sets a full stop after the question; here it is left out, because questions bring their own.
    """
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        f"User: {question} Assistant:"
    )


def chat(tokenizer: Renderer, *, system: str = "", **variables: Any) -> Template:
    """The question as a user's message in the model's own chat template, up to where the assistant begins.

    Args:
      tokenizer: has the chat template.
      system: a system message; "": none is given (the chat template may have its own).
      **variables: for the chat template, such as `enable_thinking=False` of Qwen3.

    Raises:
      ValueError: the tokenizer has no `render`.
    """
    if not hasattr(tokenizer, "render"):
        raise ValueError(
            f"template 'chat' needs a tokenizer with a chat template; {type(tokenizer).__name__} has none. "
            "Use plain, qa or r1."
        )
    opening = [{"role": "system", "content": system}] if system else []
    return lambda question: tokenizer.render(
        [*opening, {"role": "user", "content": question}], add_generation_prompt=True, **variables
    )


def _fixed(template: Template) -> Callable[..., Template]:
    """A factory like `chat`, of a template that no tokenizer, system message or variable can change."""

    def factory(tokenizer: Any, *, system: str = "", **variables: Any) -> Template:
        del tokenizer
        if system or variables:
            given = {**({"system": system} if system else {}), **variables}
            raise ValueError(f"template {template.__name__!r} has no place for {given}: they are for 'chat'.")
        return template

    return factory


_TEMPLATES: dict[str, Callable[..., Template]] = {
    "plain": _fixed(plain), "qa": _fixed(qa), "r1": _fixed(r1), "chat": chat,
}  # fmt: skip


def make_template(
    name: str, tokenizer: Any = None, *, instruction: str = "", system: str = "", **variables: Any
) -> Template:
    """The template of a name.

    Args:
      name: plain, qa, r1 or chat.
      tokenizer: `chat` needs one with a chat template.
      instruction: follows the question after a space, in every template; a name among INSTRUCTIONS, or a text.
      system: a system message, for `chat`.
      **variables: of the chat template, for `chat`.

    Raises:
      ValueError: there is no such template, or it has no place for what is given.
    """
    if name not in _TEMPLATES:
        raise ValueError(f"template={name!r} is unknown; expected one of {', '.join(_TEMPLATES)}.")
    template = _TEMPLATES[name](tokenizer, system=system, **variables)
    if not instruction:
        return template
    text = INSTRUCTIONS.get(instruction, instruction)
    return lambda question: template(f"{question} {text}")
