"""`calumma status`: what every service says about itself, on one screen or as one object."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.live import Live

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc
from services.cli import output
from services.cli.connect import HEALTH_NAMES
from services.cli.shapes import (
    CacheShape,
    HealthShape,
    QueueShape,
    ResidentShape,
    StatusShape,
    TenantShape,
    WaitShape,
    WorkerShape,
    tier_name,
)
from services.cli.status_view import render

_PROBE_TIMEOUT_S: Final = 3.0
_PROBES_AT_ONCE: Final = 16
_NAMES_AT_ONCE: Final = 256  # digests that one refresh asks the store about


@dataclass(slots=True)
class _Names:
    """Adapter names by digest, asked for when a digest is new."""

    by_digest: dict[str, str | None] = field(default_factory=dict)

    def refresh(self, digests: Iterable[str], address: str) -> None:
        missing = [digest for digest in digests if digest not in self.by_digest]
        if not missing:
            return
        with grpc.insecure_channel(address) as channel:
            store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            try:
                for digest in missing[:_NAMES_AT_ONCE]:
                    self.by_digest[digest] = _name_of(store, digest)
            except grpc.RpcError:
                return  # the store's own line says that it is not reachable


def _name_of(store: adapter_store_pb2_grpc.AdapterStoreServiceStub, digest: str) -> str | None:
    """The first adapter that has these weights, by its name."""
    request = adapter_store_pb2.ListRequest(digest=digest)
    answer = store.List(request, timeout=_PROBE_TIMEOUT_S)
    for adapter in answer.adapters:
        for version in adapter.versions:
            if version.ref.digest == digest:
                return f"{adapter.name}@{version.ref.version}"
    return None


def status(
    ctx: typer.Context,
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between refreshes.")
    ] = 1.0,
    as_json: output.JsonFlag = False,
) -> None:
    """Show services, queues, workers, their memory and the adapters they hold.

    Ends with code 1 when a service does not serve, unless --watch is given.
    """
    addresses = output.session_of(ctx).addresses
    names = _Names()
    if watch:
        _watch(addresses, names, interval_s=interval, as_json=as_json)
        return
    snapshot = take_snapshot(addresses, names)
    if as_json:
        output.print_json(snapshot)
    else:
        output.stdout.print(render(snapshot))
    if not snapshot.healthy:
        raise typer.Exit(1)


def _watch(addresses: output.Addresses, names: _Names, *, interval_s: float, as_json: bool) -> None:
    """Refresh until Ctrl-C, which is the usual end and no failure."""
    try:
        if as_json:
            while True:
                output.print_json(take_snapshot(addresses, names))
                time.sleep(interval_s)
        with Live(console=output.stdout, auto_refresh=False, screen=False) as live:
            while True:
                live.update(render(take_snapshot(addresses, names)), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def take_snapshot(addresses: output.Addresses, names: _Names) -> StatusShape:
    """Ask everybody at once; who does not answer in time is unreachable."""
    with ThreadPoolExecutor(_PROBES_AT_ONCE, thread_name_prefix="probe") as pool:
        state_call = pool.submit(_scheduler_state, addresses.scheduler)
        targets = [
            ("gateway", addresses.gateway),
            ("scheduler", addresses.scheduler),
            ("adapter_store", addresses.adapter_store),
        ]
        health = list(pool.map(_health, *zip(*targets, strict=True)))
        state = state_call.result()
        known = list(state.workers) if state else []
        if not known:  # no worker attached, or nobody to ask: look at the usual place
            known = [scheduler_pb2.WorkerState(address=addresses.worker)]
        answers = list(pool.map(_worker_state, [worker.address for worker in known]))
    digests = dict.fromkeys(a.digest for answer in answers if answer for a in answer.adapters)
    names.refresh(digests, addresses.adapter_store)
    workers = tuple(
        _worker_shape(worker, answer, names)
        for worker, answer in zip(known, answers, strict=True)
        if worker.worker_id or answer
    )
    serving = all(service.state == "serving" for service in health)
    state = state or scheduler_pb2.GetStateResponse()
    return StatusShape(
        healthy=serving and any(worker.state == "serving" for worker in workers),
        services=tuple(health),
        system=state.system,
        policy=state.policy,
        gateways=state.gateways,
        queues=tuple(QueueShape.of(queue) for queue in state.queues),
        tenants=tuple(TenantShape.of(tenant) for tenant in state.tenants),
        queued=_waits(state.queued),
        workers=workers,
    )


def _waits(queued: Iterable[scheduler_pb2.QueuedRequest]) -> tuple[WaitShape, ...]:
    return tuple(WaitShape(q.request_id, q.queue, q.waited_s, q.waits_for) for q in queued)


def _health(service: str, address: str) -> HealthShape:
    request = health_pb2.HealthCheckRequest(service=HEALTH_NAMES[service])
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types lack the methods
        try:
            response = stub.Check(request, timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return HealthShape(service, address, "unreachable")
    serving = response.status == health_pb2.HealthCheckResponse.SERVING
    return HealthShape(service, address, "serving" if serving else "not_serving")


def _scheduler_state(address: str) -> scheduler_pb2.GetStateResponse | None:
    with grpc.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        try:
            return stub.GetState(scheduler_pb2.GetStateRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return None


def _worker_state(address: str) -> worker_pb2.GetStateResponse | None:
    with grpc.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            return stub.GetState(worker_pb2.GetStateRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return None


def _worker_shape(
    known: scheduler_pb2.WorkerState, answer: worker_pb2.GetStateResponse | None, names: _Names
) -> WorkerShape:
    """What the worker says, completed by what the scheduler knows of it."""
    said = answer or worker_pb2.GetStateResponse(
        worker_id=known.worker_id,
        pool_blocks=known.capacity.pool_blocks,
        running_requests=known.status.running_requests,
        loading_requests=known.status.loading_requests,
    )
    return WorkerShape(
        worker_id=said.worker_id,
        address=known.address,
        state=_worker_condition(known, answer),
        engine=said.engine,
        base_model=said.base_model,
        running_requests=said.running_requests,
        loading_requests=said.loading_requests,
        max_requests=known.capacity.max_requests,
        pool_blocks=said.pool_blocks,
        kv_blocks=said.kv_blocks,
        adapter_blocks=said.adapter_blocks,
        block_bytes=known.capacity.block_bytes,
        step_s=known.status.step_s,
        output_tokens=said.output_tokens,
        cache=CacheShape.of(said.adapter_cache),
        adapters=tuple(_resident(adapter, names) for adapter in said.adapters),
    )


def _worker_condition(
    known: scheduler_pb2.WorkerState, answer: worker_pb2.GetStateResponse | None
) -> str:
    if answer is None:
        return "unreachable"
    if answer.draining:
        return "draining"
    return "serving" if known.attached else "detached"


def _resident(adapter: worker_pb2.AdapterState, names: _Names) -> ResidentShape:
    return ResidentShape(
        digest=adapter.digest,
        name=names.by_digest.get(adapter.digest),
        tier=tier_name(adapter.tier),
        rank=adapter.rank,
        size_bytes=adapter.size_bytes,
        users=adapter.users,
        in_host=adapter.in_host,
        pin_reason=adapter.pin_reason or None,
        ready_layers=adapter.ready_layers if adapter.num_layers else None,
        num_layers=adapter.num_layers or None,
    )
