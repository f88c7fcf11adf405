"""The RPCs of `WorkerService`: parse, call, serialise."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc

from calumma.worker.v1 import worker_pb2 as pb
from calumma.worker.v1 import worker_pb2_grpc as pb_grpc
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate
from services.worker import wire
from services.worker.driver import Driver
from services.worker.engine import EngineInfo
from services.worker.measures import Measures
from services.worker.residency import Residency
from services.worker.streams import TokenStreams

SERVICE: Final = "calumma.worker.v1.WorkerService"
LONG_LIVED: Final = frozenset({"StreamTokens"})
GRACE_S_MAX: Final = 3600.0
_Context = grpc.aio.ServicerContext[Any, Any]
Drain = Callable[[float | None], Awaitable[int]]


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """`drain` takes seconds (None: the worker's own grace) and returns how many were ended."""

    def __init__(
        self,
        worker_id: str,
        info: EngineInfo,
        *,
        driver: Driver,
        residency: Residency,
        streams: TokenStreams,
        measures: Measures,
        drain: Drain,
    ) -> None:
        self._worker_id = worker_id
        self._info = info
        self._driver = driver
        self._residency = residency
        self._streams = streams
        self._measures = measures
        self._drain = drain

    async def StreamTokens(
        self, request: pb.StreamTokensRequest, context: _Context
    ) -> AsyncIterator[pb.StreamTokensResponse]:
        gateway_id, resume = wire.resume_from(request)
        annotate(gateway_id=gateway_id, resumed=len(resume))
        # Headers at once: the gateway knows that its stream is open before the first token.
        await context.send_initial_metadata(())
        async with aclosing(self._streams.read(gateway_id, resume)) as frames:
            async for frame in frames:
                yield wire.frame_to(frame)

    async def GetState(self, request: pb.GetStateRequest, context: _Context) -> pb.GetStateResponse:
        del request, context
        snapshot = self._driver.snapshot()
        info = self._info
        return pb.GetStateResponse(
            worker_id=self._worker_id,
            engine=info.description,
            base_model=info.model_name,
            base_model_digest=info.model_digest,
            pool_blocks=info.pool_blocks,
            kv_blocks=snapshot.kv_blocks,
            adapter_blocks=snapshot.adapter_blocks,
            adapters=wire.adapter_states_to(
                self._residency.held(), snapshot.resident, num_layers=info.num_layers
            ),
            running_requests=snapshot.running,
            loading_requests=snapshot.loading,
            steps=self._measures.steps,
            output_tokens=self._measures.output_tokens,
            draining=not self._driver.is_accepting,
            adapter_cache=wire.cache_counts_to(self._measures, snapshot.cache),
            prefix_blocks=snapshot.prefix_blocks,
            leaked_blocks=self._driver.leaked_blocks,
            prefix_cache=wire.prefix_counts_to(snapshot.prefix),
        )

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> pb.DrainResponse:
        del context
        grace_s = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else None
        if grace_s is not None and not 0 <= grace_s <= GRACE_S_MAX:
            message = f"grace must be 0 to {GRACE_S_MAX:.0f} seconds"
            raise RpcError(Reason.INVALID_FIELD, message, field="grace")
        return pb.DrainResponse(aborted_requests=await self._drain(grace_s))
