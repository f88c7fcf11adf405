"""Work items: what is refused, what becomes of the rest, and when a request is complete."""

from collections.abc import Callable
from operator import attrgetter

import pytest

from calumma.scheduler.v1.scheduler_pb2 import WorkItem
from services.common.errors import Reason, RpcError
from services.worker import wire
from services.worker.engine import SampledToken
from services.worker.outputs import Finish, Tier
from services.worker.requests import LiveRequest, Work
from tests.support.worker_peers import INFO, make_blob, work_item


def _work(item: WorkItem) -> Work:
    return wire.work_from(item, INFO, caches_prefixes=True, now=50.0)


def _set(path: str, value: object) -> Callable[[WorkItem], None]:
    def change(item: WorkItem) -> None:
        *parents, name = path.split(".")
        target: object = item
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)

    return change


def _extend(path: str, *values: int) -> Callable[[WorkItem], None]:
    return lambda item: attrgetter(path)(item).extend(values)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set("prompt_tokens", 0), "prompt_tokens"),
        (_set("prompt_tokens", 9), "prompt_tokens"),
        (_extend("token_ids", -1), "token_ids"),
        (_extend("token_ids", 1000), "token_ids"),
        (_set("stopping.max_tokens", 0), "stopping.max_tokens"),
        (_set("stopping.min_tokens", -1), "stopping.min_tokens"),
        (_extend("stopping.stop_token_ids", *range(65)), "stopping.stop_token_ids"),
        (_set("sampling.temperature", float("nan")), "sampling.temperature"),
        (_set("sampling.temperature", float("inf")), "sampling.temperature"),
        (_set("sampling.temperature", -0.1), "sampling.temperature"),
        (_set("sampling.top_p", 0.0), "sampling.top_p"),
        (_set("sampling.top_p", 1.1), "sampling.top_p"),
        (_set("sampling.top_k", -1), "sampling.top_k"),
        (_set("sampling.min_p", 2.0), "sampling.min_p"),
        (_set("sampling.presence_penalty", 3.0), "sampling.presence_penalty"),
        (_set("sampling.frequency_penalty", -3.0), "sampling.frequency_penalty"),
        (_set("sampling.repetition_penalty", 0.0), "sampling.repetition_penalty"),
        (_set("logprobs", 21), "logprobs"),
        (_set("adapter.digest", "sha256:" + "A" * 64), "adapter.digest"),
        (_set("adapter.rank", 0), "adapter.rank"),
        (_set("adapter.size_bytes", 0), "adapter.size_bytes"),
    ],
)
def test_a_value_out_of_bounds_is_named(change: Callable[[WorkItem], None], field: str) -> None:
    item = work_item("one", adapter=make_blob(1).ref)
    _work(item)
    change(item)
    with pytest.raises(RpcError) as failure:
        _work(item)
    assert failure.value.reason is Reason.INVALID_FIELD
    assert failure.value.context.field == field


def test_the_context_bounds_prompt_and_output() -> None:
    assert _work(work_item("one", tokens=500, max_tokens=400)).request.max_output_tokens == 12
    assert _work(work_item("one", tokens=511)).request.max_output_tokens == 1
    with pytest.raises(RpcError) as failure:
        _work(work_item("one", tokens=512))
    assert failure.value.reason is Reason.PROMPT_TOO_LONG


def test_a_resubmission_counts_the_tokens_of_earlier_attempts() -> None:
    item = work_item("one", max_tokens=20, time_left_s=2.5)
    item.token_ids.extend([7, 8, 9])
    request = _work(item).request
    assert request.context_tokens == 11
    assert request.prior_output_tokens == 3
    assert request.remaining_output_tokens == 17
    assert request.deadline_s == 52.5


def test_a_q90_that_is_not_given_is_the_prediction() -> None:
    item = work_item("one", max_tokens=20)
    item.predicted_output_tokens = 7
    assert _work(item).request.output_tokens_q90 == 7
    item.output_tokens_q90 = 12
    assert _work(item).request.output_tokens_q90 == 12


def test_absent_sampling_fields_take_their_defaults() -> None:
    item = work_item("one")
    item.ClearField("sampling")
    sampling = _work(item).sampling
    assert (sampling.top_p, sampling.repetition_penalty, sampling.temperature) == (1.0, 1.0, 0.0)


def test_the_end_of_sequence_token_stops_unless_it_is_ignored() -> None:
    item = work_item("one")
    assert _work(item).stop_ids == frozenset()
    item.stopping.ignore_eos = False
    item.stopping.stop_token_ids.extend([40, 5000])
    item.stopping.min_tokens = 3
    work = _work(item)
    assert work.stop_ids == {2, 40, 5000}
    assert work.sampling.suppressed_ids == (2, 40)
    assert work.sampling.min_tokens == 3


@pytest.mark.parametrize(("name", "gateway"), [("", "g"), ("x" * 257, "g"), ("x", "")])
def test_an_item_that_nobody_could_be_told_of_has_no_attempt(name: str, gateway: str) -> None:
    item = work_item("one", gateway_id=gateway)
    item.request_id = name
    assert wire.item_attempt(item) is None


def test_a_stop_token_counts_only_from_min_tokens_on() -> None:
    item = work_item("one", max_tokens=5)
    item.stopping.stop_token_ids.append(40)
    item.stopping.min_tokens = 2
    live = LiveRequest(_work(item), Tier.NONE, received_s=0.0)
    finishes = [live.accept(_token(token_id), now=1.0) for token_id in (40, 41, 40)]
    assert finishes == [None, None, Finish.STOP]
    assert live.output.token_ids == [40, 41]


def test_the_last_token_of_the_limit_is_part_of_the_output() -> None:
    live = LiveRequest(_work(work_item("one", max_tokens=2)), Tier.NONE, received_s=0.0)
    finishes = [live.accept(_token(token_id), now=1.0) for token_id in (50, 51)]
    assert finishes == [None, Finish.LENGTH]
    assert live.output.token_ids == [50, 51]


def test_the_stage_and_the_timings_follow_the_request() -> None:
    item = work_item("one", adapter=make_blob(1).ref)
    live = LiveRequest(_work(item), Tier.STORE, received_s=10.0)
    assert live.stage == "adapter_load"
    assert live.timings().adapter_load_s is None
    live.end_load(now=11.5, error=None)
    live.prefill_start_s = 12.0
    assert live.stage == "prefill"
    live.accept(_token(50), now=12.25)
    live.accept(_token(51), now=14.25)
    assert live.stage == "decode"
    timings = live.timings()
    assert (timings.adapter_load_s, timings.prefill_s, timings.decode_s) == (1.5, 0.25, 2.0)
    assert timings.queue_s == 0.25


def test_a_preempted_request_opens_again_with_all_its_tokens() -> None:
    live = LiveRequest(_work(work_item("one")), Tier.NONE, received_s=0.0)
    live.accept(_token(50), now=1.0)
    spec = live.spec()
    assert spec.token_ids == (*range(100, 108), 50)
    assert (spec.prompt_tokens, spec.max_tokens) == (8, 20)


def _token(token_id: int) -> SampledToken:
    return SampledToken("one#1", token_id, None, ())
