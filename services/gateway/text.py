"""Tokens into text while they arrive: what is certain is passed on, the rest is held back.

Two rules. The pieces of `IncrementalDetokenizer` joined are what decoding all tokens at once gives,
and no piece ends in half a character. The pieces of `StopStrings` joined are the text before the
first stop string, however the text was cut, and nothing is held back that can't begin one.
"""

from collections.abc import Sequence
from typing import Final

from services.gateway.tokenizer import REPLACEMENT, ModelTokenizer

_WINDOW_TOKENS_MAX: Final = 16
_RESYNC_TOKENS: Final = 4  # UTF-8 characters have at most four bytes, and a token at least one


class IncrementalDetokenizer:
    """Decodes a growing sequence of tokens in constant time per token.

    Decodes a window: the last token whose text is out, as context (decoders treat the first token's
    leading space differently), then the tokens that are not. Two things can still change when the
    next token comes, and are held back: a trailing replacement character, which may be an
    unfinished character, and a run of byte tokens, which decoders accept or refuse as a whole.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent_characters = 0  # of the window's text

    def push(self, token_id: int) -> str:
        """Text that has become certain with this token; often empty."""
        if not self._tokenizer.is_visible(token_id):
            return ""
        self._window.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._send_all_but_last(text)
        piece = text[self._sent_characters :]
        self._restart(self._window[-1:], held_characters=0)
        return piece

    def flush(self) -> str:
        """What was held back, now that no token follows."""
        piece = self._tokenizer.decode(self._window)[self._sent_characters :]
        self._window = []
        self._sent_characters = 0
        return piece

    def _send_all_but_last(self, text: str) -> str:
        piece = text[self._sent_characters : -1]
        self._sent_characters = max(self._sent_characters, len(text) - 1)
        # Bytes that never become a character would let the window grow without limit. UTF-8 is
        # self-synchronising: its last tokens alone end in the same unfinished character.
        if len(self._window) > _WINDOW_TOKENS_MAX:
            self._restart(self._window[-_RESYNC_TOKENS:], held_characters=1)
        return piece

    def _restart(self, window: list[int], *, held_characters: int) -> None:
        self._window = window
        self._sent_characters = len(self._tokenizer.decode(window)) - held_characters


class StopStrings:
    """Finds the stop string that is complete first; of several, the one that began first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._prefixes = {stop[:size] for stop in stops for size in range(1, len(stop))}
        self._prefix_characters_max = max(map(len, self._prefixes), default=0)
        self._held = ""
        self.is_hit = False

    def push(self, text: str, *, may_stop: bool) -> str:
        """Text that is before any stop string. A match that ends while not `may_stop` is text."""
        before = len(self._held)
        buffer = self._held + text
        if may_stop and (start := self._match(buffer, before)) is not None:
            self._held = ""
            self.is_hit = True
            return buffer[:start]
        held_characters = self._possible_prefix(buffer)
        self._held = buffer[len(buffer) - held_characters :]
        return buffer[: len(buffer) - held_characters]

    def flush(self) -> str:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        return held

    def _match(self, buffer: str, before: int) -> int | None:
        """Where the first match begins that ends after the `before` characters looked at before."""
        matches = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := buffer.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        return min(matches)[1] if matches else None

    def _possible_prefix(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that a stop string may begin with."""
        for size in range(min(self._prefix_characters_max, len(buffer)), 0, -1):
            if buffer[-size:] in self._prefixes:
                return size
        return 0
