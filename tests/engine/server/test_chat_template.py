"""Chat templates do what those of transformers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import ModelError
from engine.server.chat_template import ChatTemplate, ChatTemplateError, load_chat_template

CHAT = [
    {"role": "system", "content": " Be brief. <b>&'\" "},
    {"role": "user", "content": "Wie heißt du? 你好"},
    {"role": "assistant", "content": "Ich.\n"},
    {"role": "user", "content": "x"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<ü>"}}]
# In the manner of families' templates: whitespace control, loop variables, namespaces, filters.
LLAMA = """{{- bos_token }}
{%- if tools is not none %}
    {{- "Tools: " }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
"""
QWEN = """{% set ns = namespace(last=0) %}
{% for message in messages %}
    {% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {% if loop.index0 == 2 %}{% continue %}{% endif %}
    <|im_start|>{{ message.role }}{% if message.content is string %}: {{ message.content }}
{% endif %}
{% endfor %}
{% generation %}{{ ns.last }}{% endgeneration %}
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{{ messages | tojson }}
"""


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate.compile({"default": source}, {"bos_token": "<s>"}, "here")


@pytest.mark.parametrize("source", [LLAMA, QWEN])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_texts_are_those_of_transformers(
    source: str, tools: Any, prompted: bool, variables: dict[str, Any]
) -> None:
    expected, _ = render_jinja_template(
        conversations=[CHAT],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompted,
        bos_token="<s>",
        **variables,
    )
    text = compiled(source).render(
        CHAT, tools=tools, add_generation_prompt=prompted, variables=variables
    )
    assert text == expected[0]


def test_a_final_message_is_gone_on_with_as_by_transformers() -> None:
    chat = [CHAT[1], {"role": "assistant", "content": "My name is "}]
    expected, _ = render_jinja_template(
        conversations=[chat], chat_template=LLAMA, continue_final_message=True, bos_token="<s>"
    )
    text = compiled(LLAMA).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert text == expected[0]
    assert text.endswith("My name is")
    with pytest.raises(ChatTemplateError, match="no place to go on"):
        compiled("nothing").render(chat, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('only users speak') }}", "only users speak"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_failures_say_why(source: str, said: str) -> None:
    with pytest.raises(ChatTemplateError, match=said):
        compiled(source).render(CHAT)


def test_time_is_told() -> None:
    assert compiled("{{ strftime_now('%Y') }}").render(CHAT).isdigit()


def write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    def text() -> str:
        found = load_chat_template(tmp_path)
        assert found is not None
        return found.render(CHAT)

    assert load_chat_template(tmp_path) is None
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<old>", "eos_token": "<e>"})
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<b>"}})
    assert load_chat_template(tmp_path) is None
    config = {"bos_token": {"content": "<b>"}, "chat_template": "1{{ bos_token }}{{ eos_token }}"}
    write(tmp_path, "tokenizer_config.json", config)
    assert text() == "1<b><e>"
    write(tmp_path, "chat_template.json", {"chat_template": "2{{ bos_token }}"})
    assert text() == "2<b>"
    write(tmp_path, "chat_template.jinja", "3{{ bos_token }}")
    assert text() == "3<b>"
    write(tmp_path, "mine.jinja", "4{{ bos_token }}")
    mine = load_chat_template(tmp_path, tmp_path / "mine.jinja")
    assert mine is not None
    assert mine.render(CHAT) == "4<b>"


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(CHAT) == "plain"
    assert found.render(CHAT, tools=TOOLS) == "tools"
    assert found.render(CHAT, tools=[]) == "plain"


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("{% if %}", "no valid Jinja"),
        (5, "must be a Jinja text or a list"),
        ([], "must be a Jinja text or a list"),
        ([{"name": "default"}], "must be a Jinja text or a list"),
        ([{"name": "rag", "template": "a"}], "none named 'default'"),
    ],
)
def test_broken_templates_are_told(tmp_path: Path, stored: Any, said: str) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": stored})
    with pytest.raises(ModelError, match=said):
        load_chat_template(tmp_path)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_chat_template(tmp_path, tmp_path / "missing.jinja")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="cannot be read"):
        load_chat_template(tmp_path)
    write(tmp_path, "tokenizer_config.json", "{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_chat_template(tmp_path)


def test_the_template_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ bos_token }}{{ messages[1].content }}{{ eos_token }}")
    writer.add_tensor("one", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for model in (path, tmp_path):
        found = load_chat_template(model)
        assert found is not None
        assert found.render(CHAT) == "<s>Wie heißt du? 你好</s>"
