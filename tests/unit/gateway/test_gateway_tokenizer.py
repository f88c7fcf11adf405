"""Prompts and conversations into tokens."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest

from services.common.base_model import DEFAULT_MODEL, ModelIncompleteError, pulled_folder
from services.common.errors import Reason, RpcError
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import ChatPrompt, Message, TextPrompt, TokenPrompt
from tests.unit.gateway.conftest import byte_level, default_model_folder, stories_folder

TURNS = (
    Message("system", "Be brief."),
    Message("user", 'Say "grüß Gott" 😀 <|im_end|> & <b>'),
    Message("assistant", "No."),
    Message("user", "  Why?\n"),
)


def folder_with(tmp_path: Path, config: Mapping[str, object], jinja: str | None = None) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return tmp_path


def rendered(folder: Path, *messages: Message) -> str:
    return ModelTokenizer.load(folder).render(messages)


def test_the_begin_token_comes_from_the_tokenizer_itself() -> None:
    tokenizer = ModelTokenizer.load(stories_folder())
    assert tokenizer.encode(TextPrompt("Once upon")) == (1, 403, 407)
    assert ModelTokenizer.load(default_model_folder()).encode(TextPrompt("Once upon")) == (
        6403,
        1980,
    )


def test_token_prompts_are_taken_as_they_are(letters: ModelTokenizer) -> None:
    assert letters.encode(TokenPrompt((5, 5, 7))) == (5, 5, 7)


@pytest.mark.model
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[1:2], TURNS[:2]])
def test_conversations_are_the_very_tokens_of_transformers(turns: tuple[Message, ...]) -> None:
    folder = default_model_folder()
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = reference.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    assert list(ModelTokenizer.load(folder).encode(ChatPrompt(turns))) == list(expected)
    text = reference.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert ModelTokenizer.load(folder).render(turns) == text


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"chat_template": "config"}, jinja="file")
    assert rendered(folder, Message("user", "x")) == "file"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert rendered(folder_with(tmp_path, {"chat_template": templates})) == "d"


def test_templates_see_what_templates_of_the_hub_expect(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') }}{{ tools is none }}"
        "{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% if m.role == 'user' %}{% continue %}"
        "{% endif %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    )
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    year = datetime.now().astimezone().year
    text = rendered(folder_with(tmp_path, config), Message("user", "u"), Message("assistant", "v"))
    assert text == f'<s></s>{year}True{{"a": "<é>"}}vTrue'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content.missing.deeper }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_conversation_that_the_template_refuses_is_invalid(tmp_path: Path, template: str) -> None:
    tokenizer = ModelTokenizer.load(folder_with(tmp_path, {"chat_template": template}))
    with pytest.raises(RpcError) as caught:
        tokenizer.encode(ChatPrompt((Message("user", "x"),)))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.context.field == "chat.messages"


def test_a_model_without_a_template_has_no_chat(letters: ModelTokenizer) -> None:
    with pytest.raises(RpcError) as caught:
        letters.encode(ChatPrompt((Message("user", "x"),)))
    assert caught.value.context.field == "chat"


def test_a_folder_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelIncompleteError, match=r"tokenizer\.json is missing"):
        ModelTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelIncompleteError, match=r"tokenizer\.json"):
        ModelTokenizer.load(tmp_path)
    with pytest.raises(ModelIncompleteError, match="chat template"):
        ModelTokenizer.load(folder_with(tmp_path, {"chat_template": "{% if %}"}))


def test_the_default_model_is_looked_for_in_the_cache() -> None:
    assert pulled_folder(DEFAULT_MODEL).name == DEFAULT_MODEL.replace("/", "--")
