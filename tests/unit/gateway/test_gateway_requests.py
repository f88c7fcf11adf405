"""One request under every order of frames, losses and ends."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import ErrorContext, Reason, RpcError
from services.core.types import Attempt, RequestId
from services.gateway.predictor import Prediction
from services.gateway.requests import Admitted, Effect, OwnedRequest, Placement
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import (
    AdapterRef,
    Finish,
    GenerateSpec,
    PositionLogprobs,
    Sampling,
    Stopping,
    TextPrompt,
    Timings,
    TokenLogprob,
    TokenRun,
)


class Case:
    """A request for "go" at max_tokens 20, and frames in terms of text."""

    def __init__(
        self, tokenizer: ModelTokenizer, *, adapter: AdapterRef | None = None, **stopping: object
    ) -> None:
        self.tokenizer = tokenizer
        spec = GenerateSpec(
            request_id=None,
            prompt=TextPrompt("go"),
            adapter=None,
            sampling=Sampling(),
            stopping=Stopping(**stopping),  # type: ignore[arg-type]
            logprobs=None,
            priority=0,
        )
        admitted = Admitted(
            client_id="c",
            wire_id="c.1",
            spec=spec,
            prompt_token_ids=(1,),
            adapter=adapter,
            seed=7,
            max_tokens=20,
            prediction=Prediction(5, 9),
            received_s=100.0,
            deadline_s=200.0,
            tenant="default",
        )
        self.request = OwnedRequest(admitted, tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.encode(TextPrompt(text))

    def frame(
        self,
        position: int,
        text: str = "",
        *,
        worker: str = "w",
        attempt: int = 1,
        now_s: float = 101.0,
        **rest: object,
    ) -> Effect:
        run = TokenRun("c.1", attempt, position, self.ids(text), **rest)  # type: ignore[arg-type]
        return self.request.accept(run, worker, now_s)

    def read(self) -> str:
        return self.request.take().text


@pytest.fixture
def case(letters: ModelTokenizer) -> Case:
    return Case(letters)


def test_a_request_runs_from_placement_to_its_end(case: Case) -> None:
    request = case.request
    assert (request.stage, request.has_begun) == ("queue", False)
    assert request.place(Attempt(RequestId("c.1"), 1), Placement("w", 0.5)) is Effect.CHANGED
    assert (request.stage, request.has_begun) == ("prefill", True)
    assert case.frame(0, "ab", now_s=103.0, timings=Timings(prefill_s=0.2)) is Effect.CHANGED
    assert (request.stage, request.time_to_first_token_s) == ("decode", 3.0)
    assert case.read() == "ab"
    end: dict[str, Any] = {"finish": Finish.STOP, "timings": Timings(decode_s=0.9, adapter_tier=1)}
    assert case.frame(2, "c", now_s=104.0, **end) is Effect.CHANGED
    piece = request.take()
    assert (piece.text, piece.token_ids) == ("c", case.ids("c"))
    assert request.finish is Finish.STOP
    assert request.stages == Timings(0.5, None, 0.2, 0.9, 1)


def test_tokens_may_come_before_the_news_of_the_placement(case: Case) -> None:
    assert case.frame(0, "a") is Effect.CHANGED
    assert case.request.worker_id == "w"


def test_repeated_positions_are_taken_once(case: Case) -> None:
    case.frame(0, "abc")
    assert case.frame(1, "bcd") is Effect.CHANGED
    assert case.frame(0, "ab") is Effect.CHANGED
    assert case.read() == "abcd"


def test_a_gap_loses_the_attempt(case: Case) -> None:
    case.frame(0, "a")
    assert case.frame(2, "c") is Effect.LOST
    assert case.frame(2, finish=Finish.STOP) is Effect.LOST
    assert not case.request.is_ended


def test_frames_of_older_attempts_are_dropped(case: Case) -> None:
    case.frame(0, "ab")
    case.request.begin_attempt()
    assert case.frame(2, "X") is Effect.NOTHING
    assert case.frame(2, finish=Finish.STOP) is Effect.NOTHING
    assert case.frame(2, "c", attempt=2, worker="v") is Effect.CHANGED
    assert case.read() == "abc"


def test_frames_of_a_worker_that_does_not_have_the_request_are_dropped(case: Case) -> None:
    case.request.place(Attempt(RequestId("c.1"), 1), Placement("w", 0.0))
    assert case.frame(0, "X", worker="v") is Effect.NOTHING
    assert case.read() == ""


def test_news_of_an_older_placement_is_dropped(case: Case) -> None:
    case.request.begin_attempt()
    assert case.request.place(Attempt(RequestId("c.1"), 1), Placement("w", 0.0)) is Effect.NOTHING


@pytest.mark.parametrize("reason", [Reason.WORKER_LOST, Reason.DRAINING])
def test_an_error_that_another_worker_may_cure_loses_the_attempt(
    case: Case, reason: Reason
) -> None:
    assert case.frame(0, error=RpcError(reason, "gone")) is Effect.LOST


def test_any_other_error_ends_the_request_after_its_tokens(case: Case) -> None:
    case.frame(0, "ab")
    error = RpcError(Reason.NUMERICAL_FAILURE, "NaN", stage="decode")
    assert case.frame(2, error=error) is Effect.CHANGED
    assert case.request.error is error
    assert case.read() == "ab"
    assert case.frame(2, "c") is Effect.NOTHING


def test_the_error_of_an_adapter_that_did_not_come_names_it(letters: ModelTokenizer) -> None:
    case = Case(letters, adapter=AdapterRef("sha256:0", "billing", 3, 8, 1000))
    told = RpcError(Reason.STORE_UNAVAILABLE, "down", stage="adapter_load", retry_after_s=1.0)
    assert case.frame(0, error=told) is Effect.CHANGED
    error = case.request.error
    assert error is not None
    assert (error.reason, error.message) == (told.reason, told.message)
    assert error.context == ErrorContext("adapter", "adapter_load", "adapter", "billing@3", 1.0)


def test_an_error_without_a_reason_is_internal(case: Case) -> None:
    case.frame(0, "a", finish=Finish.ERROR)
    assert case.request.error is not None
    assert case.request.error.reason is Reason.INTERNAL


def test_cancelled_before_the_deadline_means_lost_and_after_it_late(case: Case) -> None:
    assert case.frame(0, finish=Finish.CANCELLED, now_s=150.0) is Effect.LOST
    assert case.frame(0, finish=Finish.CANCELLED, now_s=199.9) is Effect.CHANGED
    assert case.request.error is not None
    assert case.request.error.reason is Reason.DEADLINE_EXCEEDED


def test_a_stop_string_over_two_frames_ends_the_request_here(letters: ModelTokenizer) -> None:
    case = Case(letters, stop=("END",))
    assert case.frame(0, "aE") is Effect.CHANGED
    assert case.read() == "a"
    assert case.frame(2, "ND more") is Effect.STOPPED
    assert case.read() == ""
    assert case.request.finish is Finish.STOP
    assert len(case.request.output) == 4  # up to the token that completed it


def test_a_stop_string_in_the_last_frame_needs_no_cancel(letters: ModelTokenizer) -> None:
    case = Case(letters, stop=("b",))
    assert case.frame(0, "abc", finish=Finish.LENGTH) is Effect.CHANGED
    assert (case.read(), case.request.finish) == ("a", Finish.STOP)


def test_a_held_beginning_of_a_stop_string_is_text_at_the_end(letters: ModelTokenizer) -> None:
    case = Case(letters, stop=("END",))
    case.frame(0, "aEN", finish=Finish.LENGTH)
    assert (case.read(), case.request.finish) == ("aEN", Finish.LENGTH)


def test_a_stop_string_that_only_the_end_reveals_is_found(byte_fallback: ModelTokenizer) -> None:
    case = Case(byte_fallback, stop=("\n",))
    case.frame(0, "a\n")  # a byte, which might go on
    assert not case.request.is_ended
    case.frame(2, finish=Finish.LENGTH)
    assert (case.read(), case.request.finish) == ("a", Finish.STOP)


def test_min_tokens_come_before_any_stop_string(letters: ModelTokenizer) -> None:
    case = Case(letters, stop=("b",), min_tokens=3)
    case.frame(0, "abcbd")
    assert (case.read(), case.request.finish) == ("abc", Finish.STOP)


def test_a_worker_can_not_exceed_max_tokens(case: Case) -> None:
    assert case.frame(0, "x" * 21) is Effect.STOPPED
    assert (len(case.request.output), case.request.finish) == (20, Finish.LENGTH)
    assert case.read() == "x" * 20


def test_an_unfinished_character_is_text_at_the_end(case: Case) -> None:
    cut = case.ids("😀")[:2]
    case.request.accept(TokenRun("c.1", 1, 0, cut, finish=Finish.LENGTH), "w", 101.0)
    assert case.read() == case.tokenizer.decode(cut) == "\ufffd"


def test_logprobs_go_with_their_tokens(case: Case) -> None:
    positions = tuple(PositionLogprobs(TokenLogprob(i, -0.5), ()) for i in case.ids("abc"))
    case.request.accept(TokenRun("c.1", 1, 0, case.ids("ab"), positions[:2]), "w", 101.0)
    assert case.request.take().logprobs == positions[:2]
    case.request.accept(TokenRun("c.1", 1, 1, case.ids("bc"), positions[1:]), "w", 101.0)
    assert case.request.take().logprobs == positions[2:]


@given(cuts=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19), st.booleans()), max_size=30))
def test_any_mix_of_overlapping_frames_gives_the_tokens_in_order(
    letters: ModelTokenizer, cuts: list[tuple[int, int, bool]]
) -> None:
    case = Case(letters)
    text = "the quick brown fox."
    ids = tuple(letters.encode(TextPrompt(text)))
    read: list[int] = []
    for start, size, moved in cuts:
        if moved:
            case.request.begin_attempt()
        run = TokenRun("c.1", case.request.number, start, ids[start : start + size])
        known = len(case.request.output)
        effect = case.request.accept(run, "w", 101.0)
        assert (effect is Effect.LOST) == (start > known)
        read.extend(case.request.take().token_ids)
        assert tuple(read) == ids[: len(read)] == tuple(case.request.output)
