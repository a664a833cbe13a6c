"""Prompts equal transformers': chat templates rendered and tokenized without it give the same ids."""

import json
import shutil
from pathlib import Path

import pytest

from router.errors import InvalidRequest
from router.tokenizer import Tokenizer

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about 🦜 & <b>the sea</b>\n"}],
    [
        {"role": "user", "content": "你好 <|im_end|>"},
        {"role": "assistant", "content": "  spaces  "},
        {"role": "user", "content": ""},
    ],
]
# Uses what templates on the hub use: special tokens, tojson, loop controls, strftime_now, generation, namespaces.
BUSY_TEMPLATE = """{{ bos_token }}{% set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {% generation %}
    {{- '[' ~ loop.index0 ~ ':' ~ message.role ~ ']' + message['content'] | trim | tojson }}
    {% endgeneration %}
{%- endfor %}
{{- ns.n }} {{ strftime_now('%Y') }}{% if not tools %} no tools{% endif %}
{%- if add_generation_prompt %}<go>{{ eos_token }}{% endif %}"""


@pytest.fixture(scope="module")
def busy(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("busy")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(smollm2 / name, directory / name)
    (directory / "chat_template.jinja").write_text(BUSY_TEMPLATE)
    return directory


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("opens_turn", [True, False])
@pytest.mark.parametrize("model", ["smollm2", "busy"])
def test_equals_transformers(request: pytest.FixtureRequest, model: str, chat: list, opens_turn: bool) -> None:
    from transformers import AutoTokenizer

    directory = request.getfixturevalue(model)
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer(directory)
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens_turn)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=opens_turn)["input_ids"]
    assert ours.chat_prompt(chat, opens_turn) == text
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.encode("plain text 🦜") == theirs("plain text 🦜")["input_ids"]


def test_a_template_may_refuse(busy: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"chat.messages.*unknown role poet"):
        Tokenizer(busy).chat_prompt([{"role": "poet", "content": ""}], True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__ }}",
        "{{ messages[99]['content'] + 1 }}",
        "{{ 1 // 0 }}",
    ],
)
def test_the_sandbox_holds(busy: Path, tmp_path: Path, template: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(busy / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(template)
    try:
        assert Tokenizer(tmp_path).chat_prompt(CHATS[0], True) in ("", "[]")
    except InvalidRequest as error:
        assert error.field == "chat.messages"


def test_template_in_tokenizer_config_and_none(busy: Path, tmp_path: Path) -> None:
    shutil.copy(busy / "tokenizer.json", tmp_path / "tokenizer.json")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    settings = {"chat_template": named, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(tmp_path).chat_prompt(CHATS[0], True) == "Hi!"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    bare = Tokenizer(tmp_path)
    assert not bare.supports_chat
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.chat_prompt(CHATS[0], True)


def test_needs_a_fast_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
