"""Workers and schedulers that go away, and what clients see of it: nothing."""

import asyncio

import grpc

from calumma.common.v1 import common_pb2
from services.common.errors import Reason, RpcError
from tests.support.gateway_peers import (
    until,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


async def test_a_lost_worker_leaves_no_gap_and_no_duplicate(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    first = await suite.scheduler.next_item()
    suite.scheduler.place(first, suite.worker)
    suite.worker.send(first, 0, "one ")
    await reader.read_until("one ")
    await suite.worker.stop()
    suite.scheduler.name(suite.worker, attached=False)
    second = await suite.scheduler.next_item()
    assert (second.request_id, second.attempt, second.prompt_tokens) == (first.request_id, 2, 2)
    assert list(second.token_ids) == suite.encode("goone ")
    assert (first.waited_s, second.waited_s > 0) == (0, True)
    assert second.sampling.seed == first.sampling.seed
    assert second.stopping.max_tokens == first.stopping.max_tokens

    suite.scheduler.give_back(first, suite.worker)  # late, and about an attempt that is over
    suite.scheduler.place(second, suite.other)
    suite.other.send(first, 4, "STALE")
    suite.other.send(second, 4, "two")
    suite.other.send(second, 7, finish=STOP)
    done = await reader.read_all()
    assert (reader.text, reader.token_ids) == ("one two", suite.encode("one two"))
    assert (done.resubmissions, done.worker_id, done.usage.output_tokens) == (1, "w2", 7)
    assert suite.scheduler.items.empty()


async def test_a_request_that_the_scheduler_returns_is_submitted_again(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    first = await suite.scheduler.next_item()
    suite.scheduler.place(first, suite.worker)
    suite.scheduler.give_back(first, suite.worker)
    second = await suite.scheduler.next_item()
    assert (second.attempt, list(second.token_ids)) == (2, suite.encode("go"))
    suite.worker.send(second, 0, "ok", finish=STOP)
    assert (await reader.read_all()).resubmissions == 1


async def test_a_worker_that_vanishes_without_a_word_is_given_up(suite: Suite) -> None:
    await suite.start(worker_reconnect_s=0.3)
    reader = suite.stream("go")
    first = await suite.scheduler.next_item()
    suite.scheduler.place(first, suite.worker)
    suite.worker.send(first, 0, "a")
    await reader.read_until("a")
    await suite.worker.stop()
    cancel = await suite.scheduler.next_cancel()
    assert (cancel.attempt.attempt, cancel.cause) == (1, "superseded")
    second = await suite.scheduler.next_item()
    assert (second.attempt, list(second.token_ids)) == (2, suite.encode("goa"))


async def test_a_worker_at_the_address_of_another_replaces_it(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    first = await suite.scheduler.next_item()
    suite.scheduler.place(first, suite.worker)
    suite.worker.send(first, 0, "a")
    await reader.read_until("a")
    await suite.worker.stop()
    suite.worker.worker_id = "w3"  # its process was killed and started again
    await suite.worker.start()
    suite.scheduler.name(suite.worker)
    second = await suite.scheduler.next_item()
    assert second.attempt == 2
    await suite.worker.next_opened()
    while not suite.worker.opened.empty():  # the old link may have been the first to find it
        await suite.worker.next_opened()
    suite.scheduler.place(second, suite.worker)
    suite.worker.send(second, 1, "b")
    await reader.read_until("ab")
    await asyncio.sleep(0.5)
    assert suite.worker.opened.empty(), "two links compete for one worker"
    suite.worker.send(second, 2, "c", finish=STOP)
    await reader.read_all()


async def test_a_worker_that_a_restarted_scheduler_does_not_name_is_dialled_no_more(
    suite: Suite,
) -> None:
    await suite.start(worker_reconnect_s=0.3)
    await suite.scheduler.stop()
    await suite.worker.stop()
    suite.scheduler.workers = [suite.other]
    await suite.scheduler.start()
    await suite.scheduler.next_hello()
    links = suite.gateway._workers._links
    await until(lambda: list(links) == ["w2"])

    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)  # on its way when the scheduler died
    assert (await suite.scheduler.next_item()).attempt == 2
    await until(lambda: list(links) == ["w2"])
    reader.call.cancel()


async def test_a_broken_token_stream_resumes_where_it_was(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "abc")
    await reader.read_until("abc")
    suite.worker.break_stream()
    (point,) = (await suite.worker.next_opened()).resume
    assert (point.request_id, point.attempt, point.next_position) == (item.request_id, 1, 3)
    suite.worker.send(item, 2, "cde", finish=STOP)
    assert (await reader.read_all()).resubmissions == 0
    assert reader.text == "abcde"


async def test_a_frame_that_was_lost_is_asked_for_again(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "a")
    await reader.read_until("a")
    suite.worker.lost_frames = 1
    suite.worker.send(item, 1, "b")
    (point,) = (await suite.worker.next_opened()).resume
    assert point.next_position == 1
    suite.worker.send(item, 1, "bc", finish=STOP)
    await reader.read_all()
    assert reader.text == "abc"


async def test_a_request_that_its_worker_does_not_know_is_submitted_again(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, error=RpcError(Reason.WORKER_LOST, "unknown").to_proto())
    again = await suite.scheduler.next_item()
    assert again.attempt == 2
    suite.worker.send(again, 0, "x", finish=STOP)
    await reader.read_all()


async def test_a_gap_in_the_tokens_is_computed_again(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.worker.send(item, 0, "ab")
    suite.worker.send(item, 3, "d")
    assert (await suite.scheduler.next_cancel()).cause == "superseded"
    again = await suite.scheduler.next_item()
    assert list(again.token_ids) == suite.encode("goab")
    suite.worker.send(item, 2, "STALE")
    suite.worker.send(again, 2, "cd", finish=STOP)
    await reader.read_all()
    assert reader.text == "abcd"


async def test_a_request_is_not_moved_for_ever(suite: Suite) -> None:
    await suite.start(max_resubmissions=2)
    reader = suite.stream("go")
    for attempt in (1, 2, 3):
        item = await suite.scheduler.next_item()
        assert item.attempt == attempt
        suite.scheduler.place(item, suite.worker)
        suite.scheduler.give_back(item, suite.worker)
    code, info, retry_s = await reader.error()
    assert (code, info.reason, retry_s) == (grpc.StatusCode.UNAVAILABLE, Reason.WORKER_LOST, 1)


async def test_only_the_news_of_the_end_was_lost(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go", stopping=common_pb2.StopConditions(max_tokens=2))
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "ab")
    await reader.read_until("ab")
    suite.scheduler.give_back(item, suite.worker)
    assert (await reader.read_all()).finish_reason == LENGTH
    assert suite.scheduler.items.empty()


async def test_a_restarted_scheduler_gets_queued_and_placed_requests(suite: Suite) -> None:
    await suite.start()
    streaming = suite.stream("go")
    placed = await suite.scheduler.next_item()
    suite.scheduler.place(placed, suite.worker)
    suite.worker.send(placed, 0, "a")
    await streaming.read_until("a")
    waiting = suite.stream("wait")
    queued = await suite.scheduler.next_item()

    await suite.scheduler.stop()
    suite.worker.send(placed, 1, "b")  # tokens don't pass the scheduler
    await streaming.read_until("ab")
    await suite.is_serving(serving=False)
    await suite.scheduler.start()
    (announced,) = (await suite.scheduler.next_hello()).placed
    assert announced.attempt.request_id == placed.request_id
    assert (announced.attempt.attempt, announced.worker_id) == (1, "w1")
    again = await suite.scheduler.next_item()
    assert (again.request_id, again.attempt) == (queued.request_id, 1)
    assert suite.scheduler.items.empty()

    suite.worker.send(placed, 2, "c", finish=STOP)
    suite.worker.send(again, 0, "x", finish=STOP)
    await streaming.read_all()
    await waiting.read_all()
    assert (streaming.text, waiting.text) == ("abc", "x")
    await suite.is_serving()


async def test_a_cancel_during_a_scheduler_restart_is_told_afterwards(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    await reader.read()
    await suite.scheduler.stop()
    reader.call.cancel()
    await until(lambda: len(suite.gateway._streams) == 0)
    await suite.scheduler.start()
    assert not (await suite.scheduler.next_hello()).placed
    assert (await suite.scheduler.next_cancel()).attempt.request_id == item.request_id


async def test_a_new_request_waits_for_the_scheduler(suite: Suite) -> None:
    await suite.scheduler.stop()
    await suite.start(ready=False, scheduler_wait_s=10)
    reader = suite.stream("go")
    await until(lambda: len(suite.gateway._streams) == 1)
    await suite.scheduler.start()
    item = await suite.scheduler.next_item()
    await suite.worker.next_opened()
    suite.worker.send(item, 0, "x", finish=STOP)
    await reader.read_all()


async def test_without_a_scheduler_requests_fail_after_a_while(suite: Suite) -> None:
    await suite.start(scheduler_wait_s=0.1, scheduler_restart_s=0.2)
    queued = suite.stream("go")
    await suite.scheduler.next_item()
    await suite.scheduler.stop()
    await suite.is_serving(serving=False)
    for reader, stage in ((suite.stream("new"), "admission"), (queued, "queue")):
        code, info, retry_s = await reader.error()
        assert info.metadata["stage"] == stage
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SCHEDULER_UNAVAILABLE)
        assert retry_s == 1


async def test_a_failure_before_the_first_token_may_be_retried_by_the_client(suite: Suite) -> None:
    await suite.start(retries=True)
    reader = suite.stream("go")
    first = await suite.scheduler.next_item()
    error = RpcError(Reason.NO_WORKER, "none", stage="queue", retry_after_s=1)
    suite.scheduler.reject(first, error)
    second = await suite.scheduler.next_item()  # by the retry policy of the client's channel
    assert second.request_id != first.request_id
    suite.worker.send(second, 0, "x", finish=STOP)
    await reader.read_all()
    assert reader.text == "x"
