"""How `calumma status` looks on a terminal. A pure function of its snapshot."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.cli import output
from services.cli.shapes import (
    HealthShape,
    QueueShape,
    ResidentShape,
    StatusShape,
    TenantShape,
    WorkerShape,
)

_BAR_CELLS: Final = 32
_ADAPTERS_SHOWN: Final = 24
_WAITS_SHOWN: Final = 5
_STATE_STYLES: Final = {
    "serving": "green",
    "not_serving": "yellow",
    "draining": "yellow",
    "detached": "yellow",
    "unreachable": "red",
}


def render(status: StatusShape) -> RenderableType:
    """Services, queues, then each worker with its memory and adapters."""
    return Group(*_sections(status))


def _sections(status: StatusShape) -> Iterator[RenderableType]:
    yield _services(status.services)
    yield _queues(status)
    if not status.workers:
        yield Text("no worker", style="red")
    for worker in status.workers:
        yield Text()
        yield from _worker(worker)


def _services(services: tuple[HealthShape, ...]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for service in services:
        grid.add_row(
            Text(service.service.replace("_", " "), style="bold"),
            service.address,
            Text(service.state.replace("_", " "), style=_STATE_STYLES[service.state]),
        )
    return grid


def _queues(status: StatusShape) -> RenderableType:
    waiting = sum(queue.length for queue in status.queues)
    title = f"queues ({_scheduling(status)}) · {waiting} waiting"
    lines: list[Text] = [Text(), Text(f"{title} · gateways: {status.gateways}", style="bold")]
    lines.extend(_queue(queue) for queue in status.queues if queue.length or queue.used_tokens)
    lines.extend(_tenant(tenant) for tenant in status.tenants)
    if causes := Counter(wait.waits_for for wait in status.queued):
        told = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        lines.append(Text(f"  the oldest wait for: {told}"))
    for wait in status.queued[:_WAITS_SHOWN]:
        request_id = output.printable(wait.request_id)
        waited = output.seconds_text(wait.waited_s)
        lines.append(Text(f"  {request_id} waits {waited} for {wait.waits_for}", style="dim"))
    return Group(*lines)


def _scheduling(status: StatusShape) -> str:
    policy = status.policy or "unknown policy"
    return policy if status.system in {"", policy} else f"{policy} in {status.system}"


def _queue(queue: QueueShape) -> Text:
    """Its length and age; what it has of the workers' memory, and what it takes in."""
    line = Text(f"  {queue.name}: {queue.length}, oldest {output.seconds_text(queue.oldest_s)}")
    if queue.quota_tokens is not None:
        line.append(f" · {queue.used_tokens:,} of {queue.quota_tokens:,.0f} tokens out")
    elif queue.used_tokens:
        line.append(f" · {queue.used_tokens:,} tokens out")
    if queue.size_limit is not None:
        line.append(f" · sizes below {queue.size_limit:,.4g}")
    return line


def _tenant(tenant: TenantShape) -> Text:
    line = Text(f"  tenant {output.printable(tenant.tenant)}: {tenant.running} requests")
    line.append(f" · {tenant.tokens_per_s:,.0f} tokens/s")
    if tenant.available_tokens is not None:
        line.append(f" · {tenant.available_tokens:,.0f} available")
    if tenant.held:
        line.append(f" · {tenant.held} held by its quotas", style="yellow")
    return line


def _worker(worker: WorkerShape) -> Iterator[RenderableType]:
    title = Text(f"worker {output.printable(worker.worker_id)} ", style="bold")
    title.append(worker.state, style=_STATE_STYLES[worker.state])
    yield title
    yield Text(f"  {worker.address} · {worker.engine} · {worker.base_model}")
    requests = f"  running {worker.running_requests}/{worker.max_requests}"
    step = f"step {output.seconds_text(worker.step_s)} · {worker.output_tokens:,} tokens so far"
    yield Text(f"{requests} · loading {worker.loading_requests} · {step}")
    yield _pool_bar(worker)
    yield from _cache(worker)
    if worker.adapters:
        yield _adapters(worker.adapters)


def _cache(worker: WorkerShape) -> Iterator[Text]:
    """How many adapters are in each tier, with their bytes, and how well that goes."""
    device = [adapter for adapter in worker.adapters if adapter.tier == "device"]
    host = [adapter for adapter in worker.adapters if adapter.in_host]
    line = Text(f"  adapters: {_counted(device)} on the device · {_counted(host)} in host memory")
    if pinned := sum(adapter.pin_reason is not None for adapter in worker.adapters):
        line.append(f" · {pinned} pinned")
    yield line
    cache = worker.cache
    if cache.hit_rate is not None:
        requests = cache.hits + cache.misses
        hits = f"  cache: {cache.hit_rate:.0%} of {requests:,} requests found theirs on the device"
        yield Text(f"{hits} · {cache.evictions:,} evicted")


def _counted(adapters: list[ResidentShape]) -> str:
    if not adapters:
        return "none"
    size_bytes = sum(adapter.size_bytes for adapter in adapters)
    return f"{len(adapters)} ({output.size_text(size_bytes)})"


def _pool_bar(worker: WorkerShape) -> Text:
    """The pool's blocks by use, to scale; anything above zero shows at least one cell."""
    total = max(worker.pool_blocks, 1)
    used = worker.kv_blocks + worker.adapter_blocks
    free = max(worker.pool_blocks - used, 0)
    cells = [_cells(blocks, total) for blocks in (worker.kv_blocks, worker.adapter_blocks)]
    bar = Text("  pool ")
    bar.append("█" * cells[0], style="cyan")
    bar.append("█" * cells[1], style="magenta")
    bar.append("░" * max(_BAR_CELLS - sum(cells), 0), style="dim")
    bar.append(f" KV {worker.kv_blocks / total:.0%}", style="cyan")
    bar.append(f" adapters {worker.adapter_blocks / total:.0%}", style="magenta")
    bar.append(f" free {free / total:.0%}")
    if worker.block_bytes:
        bar.append(f" of {output.size_text(worker.pool_blocks * worker.block_bytes)}")
    return bar


def _cells(blocks: int, total: int) -> int:
    return max(round(_BAR_CELLS * blocks / total), 1 if blocks else 0)


def _adapters(adapters: tuple[ResidentShape, ...]) -> Table:
    grid = Table.grid(padding=(0, 2))
    busiest = sorted(
        adapters, key=lambda it: (-it.users, it.pin_reason is None, it.tier != "device", it.digest)
    )
    for adapter in busiest[:_ADAPTERS_SHOWN]:
        grid.add_row(
            "",
            Text(adapter.name or output.short_digest(adapter.digest)),
            _tiers(adapter),
            f"rank {adapter.rank}",
            output.size_text(adapter.size_bytes),
            f"{adapter.users} running" if adapter.users else "",
            _pin(adapter),
        )
    if len(adapters) > _ADAPTERS_SHOWN:
        grid.add_row("", Text(f"and {len(adapters) - _ADAPTERS_SHOWN} more", style="dim"))
    return grid


def _tiers(adapter: ResidentShape) -> str:
    if adapter.num_layers is not None:
        return f"loading, {adapter.ready_layers} of {adapter.num_layers} layers"
    both = adapter.tier == "device" and adapter.in_host
    return "device, host" if both else adapter.tier


def _pin(adapter: ResidentShape) -> Text:
    if adapter.pin_reason is None:
        return Text()
    return Text(f"pinned: {output.printable(adapter.pin_reason)}", style="cyan")
