"""Chat templates with the features of the families' own, against literals and against transformers where it is."""

import datetime
import re

import jinja2
import pytest

from grpo_jax.data.chat import render_chat

# As Qwen2.5: a default system prompt, tools only where there are some.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a careful helper.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# As Qwen3: the last question is found backwards, and only answers behind it keep their reasoning; a thinking switch.
THINKING = """\
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not
           (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# As Llama 3.x: BOS, a date, a system turn that is always there, trimmed content, slices of the messages.
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# As Gemma 2: no system role, strict alternation, the assistant is called model; statements on lines of their own.
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

# As Gemma 3: the system text goes before the first user turn; content may be a list of parts.
PREFIXED_TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'
       + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# What the others do not use: loop controls, tojson's options, marked generations, escaping that must not happen.
MARKED = """\
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}
{% generation %}{{ message | tojson(indent=1) }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ message.content | tojson }} & <{{ message.role }}>
{% endif %}
{% if loop.index0 == 2 %}{% break %}{% endif %}
{% endfor %}
"""

TEMPLATES = {
    "chatml": CHATML, "thinking": THINKING, "headers": HEADERS, "turns": TURNS, "prefixed": PREFIXED_TURNS,
    "marked": MARKED,
}  # fmt: skip

SYSTEM = {"role": "system", "content": " Be brief.\n"}
QUESTION = {"role": "user", "content": "What is 2 + 2? 'é' <b> 日本\n"}
ANSWER = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"}
NEXT = {"role": "user", "content": "  And 3 + 3?"}
REASONED = {"role": "assistant", "content": "6", "reasoning_content": "\nthree, three\n"}

CONVERSATIONS = {
    "one question": [QUESTION],
    "with a system prompt": [SYSTEM, QUESTION],
    "several turns": [QUESTION, ANSWER, NEXT],
    "several turns with a system prompt": [SYSTEM, QUESTION, ANSWER, NEXT],
    "ends with an answer": [SYSTEM, QUESTION, ANSWER, NEXT, REASONED],
    "alternation broken": [QUESTION, NEXT],
}


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, conversation, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=TEMPLATES[name], **special
    )
    messages = CONVERSATIONS[conversation]
    variants = [{}]
    if name == "thinking":
        variants += [{"enable_thinking": False}, {"enable_thinking": True}]
    if name == "headers":
        variants += [{"date_string": "1 May 2025"}]
    if name == "chatml":
        variants += [{"tools": [{"type": "function", "function": {"name": "é<add>"}}]}]
    for variables in variants:
        options = {"add_generation_prompt": add_generation_prompt, **variables}
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                render_chat(TEMPLATES[name], messages, **special, **options)
        else:
            assert render_chat(TEMPLATES[name], messages, **special, **options) == expected


def test_a_default_system_prompt():
    assert render_chat(CHATML, [{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a careful helper.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_reasoning_is_kept_behind_the_last_question_only():
    text = render_chat(THINKING, [QUESTION, ANSWER, NEXT, REASONED], add_generation_prompt=False)
    assert text == (
        "<|im_start|>user\nWhat is 2 + 2? 'é' <b> 日本\n<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n  And 3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nthree, three\n</think>\n\n6<|im_end|>\n"
    )
    off = render_chat(THINKING, [NEXT], add_generation_prompt=True, enable_thinking=False)
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_date_is_given_or_today():
    def text(**variables):
        return render_chat(HEADERS, [SYSTEM, NEXT], add_generation_prompt=True, bos_token="<s>", **variables)

    assert text(date_string="1 May 2025") == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 1 May 2025\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    days = {datetime.datetime.now().strftime("%d %b %Y")}
    today = text()
    days.add(datetime.datetime.now().strftime("%d %b %Y"))  # it may be midnight
    assert today in {text(date_string=day) for day in days}


def test_lines_of_statements_leave_no_trace():
    assert render_chat(TURNS, [NEXT, REASONED, NEXT], add_generation_prompt=True, bos_token="<bos>") == (
        "<bos><start_of_turn>user\nAnd 3 + 3?<end_of_turn>\n<start_of_turn>model\n6<end_of_turn>\n"
        "<start_of_turn>user\nAnd 3 + 3?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_refuses_messages_in_its_own_words():
    with pytest.raises(ValueError, match="cannot render these messages: System role not supported"):
        render_chat(TURNS, [SYSTEM, QUESTION], add_generation_prompt=True, bos_token="")
    with pytest.raises(ValueError, match="Roles must alternate user/assistant"):
        render_chat(TURNS, [QUESTION, NEXT], add_generation_prompt=True, bos_token="")


def test_system_text_before_the_first_turn_and_content_in_parts():
    parts = {"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "image"}]}
    assert render_chat(PREFIXED_TURNS, [SYSTEM, parts], add_generation_prompt=False, bos_token="<bos>") == (
        "<bos><start_of_turn>user\n Be brief.\n\n\none<end_of_turn>\n"
    )


def test_json_is_plain_and_loops_can_be_left():
    assert render_chat(MARKED, [SYSTEM, QUESTION, REASONED, NEXT], add_generation_prompt=False, eos_token="</s>") == (
        "\"What is 2 + 2? 'é' <b> 日本\\n\" & <user>\n"
        '{\n "role": "assistant",\n "content": "6",\n "reasoning_content": "\\nthree, three\\n"\n}</s>'
    )


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages.__class__.__name__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),  # immutable, too
        ("{{ lipsum.__globals__['os'].popen('true').read() }}", "unsafe"),
        ("line\n{% if %}", "syntax error in line 2"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + none }}", "cannot render these messages: can only concatenate"),
    ],
)
def test_templates_that_are_refused(template, match):
    with pytest.raises(ValueError, match=match):
        render_chat(template, [NEXT], add_generation_prompt=False)


def test_templates_see_plain_copies():
    messages = [{"role": "user", "content": "a"}]
    render_chat("{{ messages[0].content }}", messages, add_generation_prompt=False)
    assert messages == [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="must be JSON values: Object of type object is not JSON"):
        render_chat("", [{"role": "user", "content": object()}], add_generation_prompt=False)
