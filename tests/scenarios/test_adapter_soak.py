"""Adapters come and go for a while in little memory, and nothing of the process grows.

A day of this in short: rounds in which 200 adapters are loaded, used, dropped and loaded again, by
a worker whose pool holds a dozen of them and whose host memory two dozen. What the process has
after the first rounds it has after the last.
"""

import asyncio
import gc
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from calumma.common.v1 import common_pb2
from tests.support.worker_peers import (
    Bench,
    GatewayPeer,
    bench,
    make_blob,
    quick_engine,
    work_item,
)

ADAPTERS = 200
AT_ONCE = 16
WARM_UP_ROUNDS = 2
ROUNDS = 4
RSS_GROWTH_BYTES_MAX = 4 * 2**20
SEED = 14


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the process has at rest."""

    files: int
    threads: int
    tasks: int
    series: int
    rss_bytes: int

    @classmethod
    def now(cls, reader: InMemoryMetricReader) -> "Footprint":
        gc.collect()
        status = Path("/proc/self/statm").read_text(encoding="ascii")
        return cls(
            files=len(list(Path("/proc/self/fd").iterdir())),
            threads=len(list(Path("/proc/self/task").iterdir())),
            tasks=len(asyncio.all_tasks()),
            series=_series(reader),
            rss_bytes=int(status.split()[1]) * os.sysconf("SC_PAGESIZE"),
        )


@pytest.mark.slow
async def test_nothing_grows_while_adapters_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("soak")
    monkeypatch.setattr("services.common.telemetry.meter", lambda: meter)
    blobs = [make_blob(number, layers=4) for number in range(ADAPTERS)]
    engine = quick_engine(step_ms=1, pool_blocks=160, max_sequences=AT_ONCE)
    async with bench(engine=engine, host_cache_bytes=24 * 5000) as it:
        gateway = await it.gateway()
        refs = [it.store.add(blob) for blob in blobs]
        dice = random.Random(SEED)
        prints: list[Footprint] = []
        for number in range(WARM_UP_ROUNDS + ROUNDS):
            await _round(it, gateway, number, refs, dice)
            await _check_rest(it)
            _forget(it, gateway)
            prints.append(Footprint.now(reader))
        warm, last = prints[WARM_UP_ROUNDS - 1], prints[-1]
        loads = it.worker.measures
        assert loads.downloaded_bytes > ROUNDS * ADAPTERS * 4000 // 2
        assert loads.evictions > ROUNDS * ADAPTERS // 2
        assert last.files <= warm.files
        assert last.threads <= warm.threads
        assert last.tasks <= warm.tasks
        assert last.series <= warm.series
        assert last.rss_bytes - warm.rss_bytes < RSS_GROWTH_BYTES_MAX


async def _round(
    it: Bench,
    gateway: GatewayPeer,
    number: int,
    refs: list[common_pb2.AdapterRef],
    dice: random.Random,
) -> None:
    """Every adapter once, in any order; some requests are aborted, some adapters dropped."""
    order = dice.sample(refs, len(refs))
    for first in range(0, len(order), AT_ONCE):
        some = order[first : first + AT_ONCE]
        items = [
            work_item(f"{number}-{first + at}", tokens=6, max_tokens=4, adapter=ref)
            for at, ref in enumerate(some)
        ]
        await it.scheduler.dispatch(*items)
        for item in items:
            if dice.random() < 0.2:
                await it.scheduler.abort(item.request_id)
            if dice.random() < 0.3:
                await it.scheduler.drop(item.adapter.digest)
        await it.scheduler.prefetch(*dice.sample(refs, 3))
        for item in items:
            await gateway.ended(item.request_id)


async def _check_rest(it: Bench) -> None:
    """No request, no load: all that is held are adapters that can be found, and no byte beside."""
    worker = it.worker
    assert await worker.driver.wait_idle(10)
    await it.until(
        lambda: all(one.ready_layers is None for one in worker.residency.held().values())
    )
    await it.until(lambda: not it.engine.open)
    worker.core.check_integrity()
    worker.residency.check_integrity()
    snapshot = worker.driver.snapshot()
    assert snapshot.kv_blocks == snapshot.running == snapshot.loading == 0
    assert {one.digest for one in snapshot.resident} == it.engine.adapters.keys()


def _forget(it: Bench, gateway: GatewayPeer) -> None:
    """What the peers have written down of a round must not look like growth."""
    for known in (it.scheduler.statuses, it.scheduler.host_caches, it.scheduler.finished):
        known.clear()
    for more in (it.scheduler.started, it.scheduler.prefilled, it.store.offsets, it.store.metadata):
        more.clear()
    for rest in (gateway.frames, gateway.tokens, gateway.endings, gateway.ending_frames):
        rest.clear()
    for log in (it.engine.parts, it.engine.closed, it.engine.most_layers):
        log.clear()


def _series(reader: InMemoryMetricReader) -> int:
    data = reader.get_metrics_data()
    assert data is not None
    return sum(
        len(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )
