"""Streaming detokenisation and stop strings, against decoding everything at once."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.text import IncrementalDetokenizer, StopStrings
from services.gateway.tokenizer import REPLACEMENT, ModelTokenizer
from services.gateway.types import TextPrompt


def pieces_of(tokenizer: ModelTokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def vocabulary(tokenizer: ModelTokenizer) -> int:
    return tokenizer._tokenizer.get_vocab_size()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_full_decode(
    tokenizer: ModelTokenizer, data: st.DataObject
) -> None:
    # A few tokens past the end too: ids that the model has and the tokenizer has not.
    some = st.integers(0, min(vocabulary(tokenizer) + 3, 600))
    any_token = st.integers(0, vocabulary(tokenizer) + 3)
    ids = data.draw(st.lists(some | any_token, max_size=60))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_no_piece_of_a_real_text_holds_half_a_character(
    tokenizer: ModelTokenizer, text: str
) -> None:
    ids = list(tokenizer.encode(TextPrompt(text)))
    full = tokenizer.decode(ids)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == full
    if REPLACEMENT not in full:
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_a_character_is_sent_as_soon_as_it_is_complete(letters: ModelTokenizer) -> None:
    ids = list(letters.encode(TextPrompt("aé😀b")))
    assert pieces_of(letters, ids) == ["a", "é", "", "", "", "😀", "b", ""]


def test_special_tokens_are_not_text(letters: ModelTokenizer) -> None:
    ids = list(letters.encode(TextPrompt("a<|end|>b")))
    assert "".join(pieces_of(letters, ids)) == "ab"


def test_bytes_that_never_become_text_cost_constant_time_per_token(
    letters: ModelTokenizer,
) -> None:
    (continuation,) = (
        i for i in range(256) if letters._tokenizer.id_to_token(i) == chr(0x100 + 0x22)
    )
    detokenizer = IncrementalDetokenizer(letters)
    started_s = time.monotonic()
    pieces = [detokenizer.push(continuation) for _ in range(20_000)]
    assert time.monotonic() - started_s < 5
    assert "".join(pieces) + detokenizer.flush() == letters.decode([continuation] * 20_000)


def test_the_text_of_a_token_keeps_its_leading_space(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode(TextPrompt("a the a the"))
    visible = [token_id for token_id in ids if tokenizer.is_visible(token_id)]
    assert "".join(map(tokenizer.token_text, visible)).lstrip() == "a the a the"


def first_stop(text: str, stops: list[str]) -> str:
    """The rule, letter by letter: the first moment at which the text ends in a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


letters_ab = st.text("ab", max_size=12)


@settings(max_examples=400)
@given(
    parts=st.lists(letters_ab, max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_cut_the_same_text_however_it_arrives(
    parts: list[str], stops: list[str]
) -> None:
    watch = StopStrings(stops)
    out = ""
    for part in parts:
        out += watch.push(part, may_stop=True)
        if watch.is_hit:
            break
    out += watch.flush()
    assert out == first_stop("".join(parts), stops)


@settings(max_examples=400)
@given(
    early=st.lists(letters_ab, max_size=4),
    late=st.lists(letters_ab, max_size=4),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_a_match_that_ends_too_early_is_text(
    early: list[str], late: list[str], stops: list[str]
) -> None:
    watch = StopStrings(stops)
    out = "".join(watch.push(part, may_stop=False) for part in early)
    for part in late:
        out += watch.push(part, may_stop=True)
        if watch.is_hit:
            break
    out += watch.flush()
    before, text = len("".join(early)), "".join([*early, *late])
    expected = text
    for end in range(before + 1, len(text) + 1):
        if hits := [stop for stop in stops if text[:end].endswith(stop)]:
            expected = text[: end - max(map(len, hits))]
            break
    assert out == expected


def test_only_a_possible_beginning_is_held_back() -> None:
    watch = StopStrings(["END", "\n\n"])
    assert watch.push("the E", may_stop=True) == "the "
    assert watch.push("N", may_stop=True) == ""
    assert watch.push("TRY\n", may_stop=True) == "ENTRY"
    assert watch.push("x", may_stop=True) == "\nx"
    assert watch.push("EN", may_stop=True) == ""
    assert watch.push("D of it", may_stop=True) == ""
    assert watch.is_hit
