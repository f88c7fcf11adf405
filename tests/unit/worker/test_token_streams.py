"""Token streams without a network: frames, resumption, retention."""

import asyncio

import pytest

from services.common.errors import Reason, RpcError
from services.core.types import Attempt, GatewayId, RequestId
from services.worker import streams
from services.worker.outputs import Ending, Finish, Output, Timings
from services.worker.streams import Frame, TokenStreams

GATEWAY = GatewayId("gateway-1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """Streams with a clock that stands still, and a list of gateways given up."""

    def __init__(self, *, away_s: float = 60.0) -> None:
        self.clock = Clock()
        self.away: list[GatewayId] = []
        self.streams = TokenStreams(away_s=away_s, on_away=self.away.append, clock=self.clock)

    def add(self, name: str, *, first_position: int = 0, gateway: GatewayId = GATEWAY) -> Output:
        output = Output(_attempt(name), gateway, first_position)
        self.streams.add(output)
        return output

    def grow(self, output: Output, *token_ids: int) -> None:
        output.token_ids.extend(token_ids)
        self.streams.publish([output])

    def end(self, output: Output) -> None:
        output.end(Ending(Finish.STOP, Timings()))
        self.streams.publish([output])


def _attempt(name: str, number: int = 1) -> Attempt:
    return Attempt(RequestId(name), number)


def _seen(frame: Frame) -> dict[str, tuple[int, list[int]]]:
    return {part.attempt.request_id: (part.first_position, part.token_ids) for part in frame.slices}


async def test_tokens_of_several_steps_merge_while_nobody_reads() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    a, b = rig.add("a"), rig.add("b", first_position=5)
    rig.grow(a, 1)
    rig.grow(b, 7)
    rig.grow(a, 2, 3)
    assert _seen(await anext(frames)) == {"a": (0, [1, 2, 3]), "b": (5, [7])}
    rig.grow(a, 4)
    second = await anext(frames)
    assert (second.sequence, _seen(second)) == (2, {"a": (3, [4])})
    await frames.aclose()


async def test_the_ending_comes_with_the_last_tokens_and_once() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    a = rig.add("a")
    rig.grow(a, 1)
    rig.end(a)
    (part,) = (await anext(frames)).slices
    assert part.ending is not None
    b = rig.add("b")
    rig.grow(b, 1)
    assert set(_seen(await anext(frames))) == {"b"}
    await frames.aclose()


async def test_a_frame_is_bounded_and_the_rest_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FRAME_TOKENS_MAX", 4)
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    a, b = rig.add("a"), rig.add("b")
    rig.grow(a, *range(6))
    rig.grow(b, 9)
    rig.end(a)
    first, second = await anext(frames), await anext(frames)
    assert _seen(first) == {"a": (0, [0, 1, 2, 3])}
    assert first.slices[0].ending is None
    assert _seen(second) == {"a": (4, [4, 5]), "b": (0, [9])}
    assert second.slices[0].ending is not None
    await frames.aclose()


async def test_a_resume_point_rewinds_and_an_unknown_one_is_lost() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    a = rig.add("a")
    rig.grow(a, 1, 2, 3)
    await anext(frames)
    await frames.aclose()
    resume = {_attempt("a"): 2, _attempt("x"): 0, _attempt("a", 2): 0}
    frames = rig.streams.read(GATEWAY, resume)
    frame = await anext(frames)
    assert _seen(frame) == {"a": (2, [3])}
    assert frame.lost == [_attempt("x"), _attempt("a", 2)]
    await frames.aclose()


@pytest.mark.parametrize("position", [-5, 0, 3, 4, 99])
async def test_a_resume_point_out_of_range_sends_what_there_is(position: int) -> None:
    rig = Rig()
    a = rig.add("a", first_position=3)
    rig.grow(a, 1, 2)
    rig.end(a)
    frames = rig.streams.read(GATEWAY, {_attempt("a"): position})
    (part,) = (await anext(frames)).slices
    start = min(max(position - 3, 0), 2)
    assert (part.first_position, part.token_ids) == (3 + start, [1, 2][start:])
    assert part.ending is not None
    await frames.aclose()


async def test_another_gateways_request_is_not_sent() -> None:
    rig = Rig()
    rig.grow(rig.add("a", gateway=GatewayId("other")), 1)
    frames = rig.streams.read(GATEWAY, {_attempt("a"): 0})
    frame = await anext(frames)
    assert frame.slices == []
    assert frame.lost == [_attempt("a")]
    await frames.aclose()


async def test_ended_outputs_are_kept_for_a_minute() -> None:
    rig = Rig()
    rig.end(rig.add("a"))
    rig.clock.now += 59
    rig.end(rig.add("b"))
    assert rig.streams.find(_attempt("a")) is not None
    rig.clock.now += 2
    rig.end(rig.add("c"))
    assert rig.streams.find(_attempt("a")) is None
    assert rig.streams.find(_attempt("b")) is not None


async def test_ended_outputs_are_bounded_in_number() -> None:
    rig = Rig()
    for number in range(streams.ENDED_MAX + 10):
        rig.end(rig.add(str(number)))
    assert rig.streams.find(_attempt("9")) is None
    assert rig.streams.find(_attempt("10")) is not None


async def test_a_reader_that_falls_too_far_behind_must_resume() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    waiting = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0)
    for number in range(streams.ENDED_MAX + 1):
        rig.end(rig.add(str(number)))
    with pytest.raises(RpcError) as failure:
        await waiting
    assert failure.value.reason is Reason.CONFLICT


async def test_a_gateway_with_running_requests_that_stays_away_is_given_up_once() -> None:
    rig = Rig(away_s=0.02)
    a = rig.add("a")
    await asyncio.sleep(0.05)
    assert rig.away == [GATEWAY]
    rig.end(a)
    frames = rig.streams.read(GATEWAY, {})
    await anext(frames)
    await frames.aclose()
    await asyncio.sleep(0.05)
    assert rig.away == [GATEWAY], "nothing runs, so nobody is missed"


async def test_nothing_is_kept_of_a_gateway_without_requests() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {_attempt("x"): 0})
    await anext(frames)
    await frames.aclose()
    assert rig.streams._gateways == {}


async def test_a_close_sends_what_is_there_and_ends_the_stream() -> None:
    rig = Rig()
    frames = rig.streams.read(GATEWAY, {})
    a = rig.add("a")
    rig.grow(a, 1)
    rig.streams.close()
    assert [_seen(frame) async for frame in frames] == [{"a": (0, [1])}]
