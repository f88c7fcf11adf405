"""The requests that are here, and what their gateways and the scheduler must hear of them.

A request ends for its gateway as soon as its end is known, and departs when the core lets it go:
the blocks of a request that is in a step are free only after it. What is to be told is collected
and told at once, after the next step has been handed to the engine.
"""

from collections.abc import Iterator

from services.common.errors import RpcError
from services.core.types import AdapterDigest, Attempt, GatewayId, RequestId
from services.worker.outputs import Ending, Finish, Output, Timings
from services.worker.reports import Finished, Prefilled, Reports, Started
from services.worker.requests import LiveRequest
from services.worker.streams import TokenStreams


class Roster:
    """All live requests, in order of arrival."""

    def __init__(self, streams: TokenStreams, reports: Reports) -> None:
        self._streams = streams
        self._reports = reports
        self._by_attempt: dict[Attempt, LiveRequest] = {}
        self._latest: dict[RequestId, LiveRequest] = {}
        self._changed: dict[Attempt, Output] = {}
        self._departed: list[LiveRequest] = []

    def __len__(self) -> int:
        return len(self._by_attempt)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._by_attempt.values())

    def find(self, attempt: Attempt) -> LiveRequest | None:
        """A request that has not departed."""
        return self._by_attempt.get(attempt)

    def latest(self, request_id: RequestId) -> LiveRequest | None:
        """The attempt that counts."""
        return self._latest.get(request_id)

    def awaiting(self, digest: AdapterDigest) -> list[LiveRequest]:
        """Those that wait for this adapter, oldest first."""
        return [live for live in self if live.awaits_adapter and live.work.digest == digest]

    def unended(self, gateway_id: GatewayId | None = None) -> list[LiveRequest]:
        """Those whose gateways still expect tokens: all, or one gateway's."""
        return [
            live
            for live in self
            if live.output.ending is None and gateway_id in {None, live.work.request.gateway_id}
        ]

    def is_known(self, attempt: Attempt) -> bool:
        """True for a live or recently ended attempt. The latter is reported finished once more."""
        output = self._streams.find(attempt)
        if output is not None and output.ending is not None:
            self._reports.add(Finished(attempt, output.ending.finish, output.end_position))
        return output is not None

    # --- changes ----------------------------------------------------------------------------

    def add(self, live: LiveRequest) -> None:
        """A request has come."""
        attempt = live.work.attempt
        assert attempt not in self._by_attempt
        self._by_attempt[attempt] = self._latest[attempt.request_id] = live
        self._streams.add(live.output)

    def refuse(self, attempt: Attempt, gateway_id: GatewayId, error: RpcError) -> None:
        """Fail a request that never got in."""
        output = Output(attempt, gateway_id, first_position=0)
        output.end(Ending(Finish.ERROR, Timings(), error))
        self._streams.add(output)
        self._streams.publish([output])
        self._reports.add(Finished(attempt, Finish.ERROR, output_tokens=0))

    def start(self, live: LiveRequest) -> None:
        """Its sequence is opened, for the first time or again."""
        if not live.is_announced:
            live.is_announced = True
            self._reports.add(Started(live.work.attempt))

    def prefill(self, live: LiveRequest) -> None:
        """Its prompt is computed."""
        self._reports.add(Prefilled(live.work.attempt))

    def touch(self, live: LiveRequest) -> None:
        """It has a new token."""
        self._changed[live.work.attempt] = live.output

    def end(self, live: LiveRequest, finish: Finish, *, error: RpcError | None = None) -> None:
        """Its gateway gets the ending with the next frame. Nothing happens if it has ended."""
        if live.output.ending is None:
            live.end(finish, error=error)
            self.touch(live)

    def depart(self, live: LiveRequest) -> None:
        """The core has let it go: its memory is free."""
        attempt = live.work.attempt
        assert live.output.ending is not None
        del self._by_attempt[attempt]
        if self._latest.get(attempt.request_id) is live:
            del self._latest[attempt.request_id]
        self._departed.append(live)

    # --- telling ----------------------------------------------------------------------------

    def tell_gateways(self) -> None:
        """Put new tokens and endings on the streams."""
        if self._changed:
            changed, self._changed = self._changed, {}
            self._streams.publish(changed.values())

    def tell_scheduler(self) -> None:
        """Report who has departed, and record their spans."""
        departed, self._departed = self._departed, []
        for live in departed:
            ending = live.output.ending
            assert ending is not None
            live.record_stages()
            output_tokens = live.output.end_position
            self._reports.add(Finished(live.work.attempt, ending.finish, output_tokens))
        self._reports.bell.set()
