"""Chat templates: messages -> the text a model reads, as `apply_chat_template` of transformers writes it."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

__all__ = ["render_chat"]


class _Generation(ext.Extension):
    """`{% generation %}` marks what an assistant wrote; the text inside stands as it is, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller):
        return caller()


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML, which no chat template wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.Environment:
    """The names and settings that templates are written for; a template is code from the outside: a sandbox."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any
) -> str:
    """Messages in a model's own format.

    Templates that write today's date (Llama 3) make a prompt depend on the clock; they read `date_string` first:
    give it, and a run can be repeated on another day.

    Args:
      template: jinja2 source, a model's `chat_template`.
      messages: `{"role": ..., "content": ...}`, in turn; JSON values only, templates see copies of them.
      add_generation_prompt: whether the text ends with the opening of an assistant's turn.
      **variables: what the template reads besides: `bos_token`, `enable_thinking`, `date_string`, `tools`, ...

    Returns:
      The text, special tokens spelled out (BOS too, where the template writes it).

    Raises:
      ValueError: the template has a syntax error, refuses the messages (`raise_exception`), or reaches for what the
        sandbox forbids; or a message or a variable is not JSON.
    """
    try:
        # Through JSON, so that a template from the outside is handed no object with methods that do something.
        values = json.loads(json.dumps({"tools": None, "documents": None, **variables, "messages": list(messages)}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages and variables of a chat template must be JSON values: {error}.") from error
    try:
        return _compiled(template).render(values, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: such as text + None
        raise ValueError(f"the chat template cannot render these messages: {error}") from error
