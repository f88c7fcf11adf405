"""`SchedulerService`: each RPC hands over to the module that owns it."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.interceptors import annotate
from services.scheduler import wire
from services.scheduler.driver import Driver
from services.scheduler.gateways import GatewayStreams
from services.scheduler.residency import Residency
from services.scheduler.unloading import Unloading
from services.scheduler.workers import WorkerStreams

Context = grpc.aio.ServicerContext[Any, Any]


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """The RPCs of the scheduler."""

    def __init__(
        self,
        scheduler_id: str,
        *,
        system: str,
        driver: Driver,
        gateways: GatewayStreams,
        workers: WorkerStreams,
        residency: Residency,
        unloading: Unloading,
    ) -> None:
        self._scheduler_id = scheduler_id
        self._system = system
        self._driver = driver
        self._gateways = gateways
        self._workers = workers
        self._residency = residency
        self._unloading = unloading

    def Submit(
        self,
        request_iterator: AsyncIterator[scheduler_pb2.SubmitRequest],
        context: Context,  # noqa: ARG002 - gRPC passes it
    ) -> AsyncGenerator[scheduler_pb2.SubmitResponse]:
        """A gateway's stream."""
        return self._gateways.serve(request_iterator)

    def Attach(
        self,
        request_iterator: AsyncIterator[scheduler_pb2.AttachRequest],
        context: Context,  # noqa: ARG002 - gRPC passes it
    ) -> AsyncGenerator[scheduler_pb2.AttachResponse]:
        """A worker's stream."""
        return self._workers.serve(request_iterator)

    async def GetState(
        self,
        request: scheduler_pb2.GetStateRequest,  # noqa: ARG002 - has no fields
        context: Context,  # noqa: ARG002 - gRPC passes it
    ) -> scheduler_pb2.GetStateResponse:
        """The core's state, with what the streams know of each worker."""
        return wire.from_snapshot(
            self._driver.snapshot(),
            scheduler_id=self._scheduler_id,
            system=self._system,
            find_worker=self._workers.find,
        )

    def WatchResidency(
        self,
        request: scheduler_pb2.WatchResidencyRequest,  # noqa: ARG002 - has no fields
        context: Context,  # noqa: ARG002 - gRPC passes it
    ) -> AsyncGenerator[scheduler_pb2.WatchResidencyResponse]:
        """Where every adapter is."""
        return self._residency.watch()

    async def UnloadAdapter(
        self,
        request: scheduler_pb2.UnloadAdapterRequest,
        context: Context,  # noqa: ARG002 - gRPC passes it
    ) -> scheduler_pb2.UnloadAdapterResponse:
        """Out of every worker's memory."""
        annotate(digest=request.digest)
        answer = await self._unloading.unload(request)
        annotate(
            freed_bytes=answer.freed_bytes,
            unloaded=len(answer.unloaded_workers),
            holding=len(answer.holding_workers),
        )
        return answer
