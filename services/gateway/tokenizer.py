"""Text to tokens and back, by the base model's own `tokenizer.json` and chat template.

The template runs in jinja's sandbox, with what templates of the model hub expect: the special
tokens, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML. Special tokens
at the front of a plain prompt are added by the tokenizer's own post-processor; a chat template
writes its own. Blocking: long prompts belong in an executor.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn, assert_never

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from services.common.base_model import JSON_BYTES_MAX, ModelIncompleteError
from services.common.errors import Reason, RpcError
from services.gateway.types import ChatPrompt, Message, Prompt, TextPrompt, TokenPrompt

REPLACEMENT: Final = "\ufffd"  # what bytes decode to that are no UTF-8, or not yet


class ModelTokenizer:
    """The tokenizer of one model folder. Immutable, and safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template | None) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes = _byte_tokens(tokenizer)
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor_characters = len(self.decode(self._anchor))

    @classmethod
    def load(cls, folder: Path) -> "ModelTokenizer":
        """Read a model folder. Raises ModelIncompleteError."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_buffer(_read(path))
        except ValueError as error:
            raise ModelIncompleteError(f"{path}: {error}") from error
        return cls(tokenizer, _load_template(folder))

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt. Raises RpcError when a conversation can't be rendered."""
        match prompt:
            case TokenPrompt(token_ids):
                return token_ids
            case TextPrompt(text):
                return tuple(self._tokenizer.encode(text).ids)
            case ChatPrompt(messages):
                text = self.render(messages)
                return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
            case _:
                assert_never(prompt)

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as text, up to where the assistant's next turn begins. Raises RpcError."""
        if self._template is None:
            raise RpcError(
                Reason.INVALID_FIELD, "the base model has no chat template", field="chat"
            )
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RpcError(
                Reason.INVALID_FIELD,
                f"the model's chat template refuses these messages: {error}",
                field="chat.messages",
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self._tokenizer.decode(token_ids)

    def is_visible(self, token_id: int) -> bool:
        """False for special tokens and for ids that no token has: `decode` leaves them out."""
        return token_id not in self._special and self._tokenizer.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """True for a token that stands for one byte and is decoded together with its neighbours."""
        return token_id in self._bytes

    def token_text(self, token_id: int) -> str:
        """One token as text, its leading space included; a special token by its name."""
        if token_id in self._special:
            return self._tokenizer.id_to_token(token_id) or ""
        # Some decoders strip the first token's space, so the token is not put first.
        return self.decode([*self._anchor, token_id])[self._anchor_characters :]


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens such as "<0x0A>", where the decoder reads them as bytes and not as these letters."""
    named = {f"<0x{value:02X}>": value for value in range(256)}
    ids = {name: tokenizer.token_to_id(name) for name in named}
    return frozenset(
        token_id
        for name, token_id in ids.items()
        if token_id is not None and tokenizer.decode([token_id]) != name
    )


def _load_template(folder: Path) -> jinja2.Template | None:
    path = folder / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(_read(path)) if path.is_file() else {}
    except ValueError as error:
        raise ModelIncompleteError(f"{path}: {error}") from error
    source = _template_source(folder, config)
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    names: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    for name, value in config.items():
        if name.endswith("_token") and value is not None:
            names[name] = value["content"] if isinstance(value, dict) else value
    try:
        return environment.from_string(source, globals=names)
    except jinja2.TemplateError as error:
        raise ModelIncompleteError(f"{folder}: the chat template is bad: {error}") from error


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the configuration's: one text, or the default one of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read(file).decode()
    match config.get("chat_template"):
        case str(text):
            return text
        case [*entries]:
            named = {entry["name"]: entry["template"] for entry in entries}
            return named.get("default")
        case _:
            return None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ModelIncompleteError(f"{path} is missing")
    if path.stat().st_size > JSON_BYTES_MAX:
        raise ModelIncompleteError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
    return path.read_bytes()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
