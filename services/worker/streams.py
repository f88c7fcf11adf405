"""Tokens on their way to the gateways: one stream per gateway, one frame per step.

Rules:
  - A frame holds all that its gateway's requests produced since the frame before. While a reader is
    slow nothing is queued: its next frame is larger. Memory is that of the tokens themselves.
  - A stream begins by sending again whatever the gateway may lack: from each resume point on, and
    all of the requests that the gateway did not name. Positions make a repetition harmless.
  - Ended outputs are kept for a while, so that a broken stream loses none: `ENDED_MAX` of them for
    `ENDED_S`. A reader that falls further behind has its stream ended and must resume.
  - A gateway's newer stream ends its older one. A gateway with running requests and without a
    stream for `away_s` is gone: `on_away` is called.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import Reason, RpcError
from services.core.types import Attempt, GatewayId
from services.worker.outputs import Output, Slice

ENDED_MAX: Final = 1024
ENDED_S: Final = 60.0
FRAME_TOKENS_MAX: Final = 8192  # with 20 alternatives each, a frame of under 4 MiB


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. `lost` are resume points of requests that this worker does not know."""

    sequence: int
    slices: list[Slice]
    lost: list[Attempt]


@dataclass(slots=True, eq=False)
class _Reader:
    """One open stream of a gateway."""

    pending: dict[Attempt, Output]
    lost: list[Attempt]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    dismissal: str | None = None  # why it must end
    frames: int = 0

    def next_frame(self) -> Frame | None:
        """What is unsent, in the order in which it became so, or None."""
        slices: list[Slice] = []
        room_tokens = FRAME_TOKENS_MAX
        while self.pending and room_tokens > 0:
            attempt, output = next(iter(self.pending.items()))
            if output.has_unsent:
                slices.append(output.take(room_tokens))
                room_tokens -= len(slices[-1].token_ids)
            if not output.has_unsent:
                del self.pending[attempt]
        lost, self.lost = self.lost, []
        if not slices and not lost:
            return None
        self.frames += 1
        return Frame(self.frames, slices, lost)

    def dismiss(self, why: str) -> None:
        self.dismissal = why
        self.wake.set()


@dataclass(slots=True, eq=False)
class _Gateway:
    outputs: dict[Attempt, Output] = field(default_factory=dict)
    reader: _Reader | None = None
    away: asyncio.TimerHandle | None = None

    @property
    def has_running(self) -> bool:
        return any(output.ending is None for output in self.outputs.values())


class TokenStreams:
    """The outputs of all running and recently ended requests, and the streams that carry them."""

    def __init__(
        self,
        *,
        away_s: float,
        on_away: Callable[[GatewayId], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._away_s = away_s
        self._on_away = on_away
        self._clock = clock
        self._gateways: dict[GatewayId, _Gateway] = {}
        self._outputs: dict[Attempt, Output] = {}
        self._ended: deque[tuple[float, Output]] = deque()
        self._closing = False

    def find(self, attempt: Attempt) -> Output | None:
        """The output of a running or recently ended request."""
        return self._outputs.get(attempt)

    @property
    def reading(self) -> int:
        """Open streams."""
        return sum(gateway.reader is not None for gateway in self._gateways.values())

    def add(self, output: Output) -> None:
        """A request has come. Its tokens wait here if its gateway has no stream yet."""
        assert output.attempt not in self._outputs
        gateway = self._gateways.setdefault(output.gateway_id, _Gateway())
        self._outputs[output.attempt] = gateway.outputs[output.attempt] = output
        if gateway.reader is None:
            self._await_return(output.gateway_id, gateway)

    def publish(self, outputs: Iterable[Output]) -> None:
        """These have more tokens than before, or their ending."""
        for output in outputs:
            if output.ending is not None:
                self._ended.append((self._clock(), output))
            reader = self._gateways[output.gateway_id].reader
            if reader is not None:
                reader.pending[output.attempt] = output
                reader.wake.set()
        self._forget_old()

    async def read(
        self, gateway_id: GatewayId, resume: dict[Attempt, int]
    ) -> AsyncGenerator[Frame]:
        """The frames of one stream. Raises RpcError when it is replaced or has fallen behind."""
        reader = self._attach(gateway_id, resume)
        try:
            while True:
                if reader.dismissal is not None:
                    raise RpcError(Reason.CONFLICT, reader.dismissal)
                frame = reader.next_frame()
                if frame is not None:
                    yield frame
                    continue
                if self._closing:
                    return
                reader.wake.clear()
                await reader.wake.wait()
        finally:
            self._detach(gateway_id, reader)

    def close(self) -> None:
        """End every stream once all that is there has been sent."""
        self._closing = True
        for gateway in self._gateways.values():
            if gateway.reader is not None:
                gateway.reader.wake.set()
            if gateway.away is not None:
                gateway.away.cancel()

    def _attach(self, gateway_id: GatewayId, resume: dict[Attempt, int]) -> _Reader:
        self._forget_old()
        gateway = self._gateways.setdefault(gateway_id, _Gateway())
        if gateway.reader is not None:
            gateway.reader.dismiss("a newer stream of this gateway has taken over")
        if gateway.away is not None:
            gateway.away.cancel()
            gateway.away = None
        for attempt, output in gateway.outputs.items():
            output.rewind(resume.get(attempt, output.first_position))
        lost = [attempt for attempt in resume if attempt not in gateway.outputs]
        gateway.reader = _Reader(dict(gateway.outputs), lost)
        return gateway.reader

    def _detach(self, gateway_id: GatewayId, reader: _Reader) -> None:
        gateway = self._gateways.get(gateway_id)
        if gateway is None or gateway.reader is not reader:
            return
        gateway.reader = None
        self._await_return(gateway_id, gateway)
        self._drop_if_idle(gateway_id, gateway)

    def _await_return(self, gateway_id: GatewayId, gateway: _Gateway) -> None:
        if gateway.away is None and gateway.has_running and not self._closing:
            loop = asyncio.get_running_loop()
            gateway.away = loop.call_later(self._away_s, self._give_up, gateway_id)

    def _give_up(self, gateway_id: GatewayId) -> None:
        gateway = self._gateways[gateway_id]
        gateway.away = None
        self._on_away(gateway_id)
        self._drop_if_idle(gateway_id, gateway)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - ENDED_S
        while self._ended and (len(self._ended) > ENDED_MAX or self._ended[0][0] < oldest_s):
            _, output = self._ended.popleft()
            del self._outputs[output.attempt]
            gateway = self._gateways[output.gateway_id]
            del gateway.outputs[output.attempt]
            if gateway.reader is not None and output.has_unsent:
                gateway.reader.dismiss("the reader has fallen too far behind")
            self._drop_if_idle(output.gateway_id, gateway)

    def _drop_if_idle(self, gateway_id: GatewayId, gateway: _Gateway) -> None:
        if gateway.reader is None and not gateway.outputs:
            if gateway.away is not None:
                gateway.away.cancel()
            self._gateways.pop(gateway_id, None)
