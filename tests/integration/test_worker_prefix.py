"""What requests begin with alike is computed once, and they are answered as if it were not."""

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1.scheduler_pb2 import WorkItem
from services.common.adapter_container import LoraRows, encode
from services.common.base_model import linear_shapes, load_config
from services.core.snapshots import ReplicaSnapshot
from services.worker.config import WorkerSettings
from services.worker.service import Worker, start
from tests.support.worker_peers import (
    Blob,
    GatewayPeer,
    SchedulerPeer,
    StorePeer,
    work_item,
)

_SHARED = Path(
    os.environ.get("CALUMMA_SHARED") or Path(__file__).resolve().parents[2].parent / "shared"
)
_FOLDER = _SHARED / "data" / "models" / "stories260K" / "fp32"
_COMMON = tuple(3 + 7 * index % 400 for index in range(70))  # four blocks of 16, and 6 tokens

pytestmark = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"stories260K is not in {_FOLDER}; set CALUMMA_SHARED"
)


class _Parts:
    """A worker with a scheduler, a gateway and a store of the test's."""

    def __init__(
        self, worker: Worker, scheduler: SchedulerPeer, gateway: GatewayPeer, store: StorePeer
    ) -> None:
        self.worker = worker
        self.scheduler = scheduler
        self.gateway = gateway
        self.store = store

    async def serve(self, *items: WorkItem) -> list[list[int]]:
        """One after the other; their tokens."""
        for item in items:
            await self.scheduler.dispatch(item)
            await self.gateway.ended(item.request_id)
        return [self.gateway.tokens[item.request_id] for item in items]

    def snapshot(self) -> ReplicaSnapshot:
        self.worker.core.check_integrity()
        assert self.worker.driver.leaked_blocks == 0
        return self.worker.driver.snapshot()


@asynccontextmanager
async def _parts(*, memory_bytes: int = 64 * 2**20, **options: bool) -> AsyncGenerator[_Parts]:
    store, scheduler = await StorePeer().listen(), await SchedulerPeer().listen()
    worker = await start(
        WorkerSettings(
            listen="127.0.0.1:0",
            scheduler=scheduler.address,
            adapter_store=store.address,
            model=str(_FOLDER),
            device="cpu",
            dtype="float32",
            threads=1,
            memory_bytes=memory_bytes,
            prefill_tokens_per_step=32,
            **options,  # type: ignore[arg-type]  # flags only
        )
    )
    gateway = GatewayPeer(worker.address)
    try:
        await scheduler.attached()
        await gateway.open()
        yield _Parts(worker, scheduler, gateway, store)
    finally:
        await gateway.close()
        await worker.stop(1.0)
        await scheduler.close()
        await store.close()


def _item(
    name: str,
    tokens: Sequence[int] = _COMMON,
    *,
    more: Sequence[int] = (),
    adapter: common_pb2.AdapterRef | None = None,
    tenant: str = "t",
) -> WorkItem:
    ids = [1, *tokens, *more]
    item = work_item(name, tokens=len(ids), max_tokens=30, adapter=adapter)
    item.token_ids[:] = ids
    item.tenant = tenant
    return item


def _talks(ref: common_pb2.AdapterRef) -> list[WorkItem]:
    items = [_item(f"base{n}", more=[9 + n] * (3 * n)) for n in range(4)]
    items += [_item(f"tuned{n}", more=[9 + n] * (17 * n), adapter=ref) for n in range(4)]
    return items


async def test_tokens_with_the_cache_equal_those_without() -> None:
    tokens = {}
    for has_cache in (True, False):
        async with _parts(prefix_cache=has_cache) as it:
            tokens[has_cache] = await it.serve(*_talks(it.store.add(_blob())))
            hit_tokens = it.snapshot().prefix.hit_tokens
            assert hit_tokens == (64 * 6 if has_cache else 0)
    assert tokens[True] == tokens[False]
    assert len({tuple(each) for each in tokens[True]}) > 4


async def test_requests_at_once_in_little_memory_are_answered_as_each_alone() -> None:
    async with _parts(prefix_cache=False) as it:
        alone = await it.serve(*_talks(it.store.add(_blob())))
    async with _parts(memory_bytes=900_000) as it:
        items = _talks(it.store.add(_blob()))
        for item in items:
            item.predicted_output_tokens = 1
        await it.scheduler.dispatch(*items)
        await it.gateway.ended(*(item.request_id for item in items))
        assert [it.gateway.tokens[item.request_id] for item in items] == alone
        assert it.snapshot().prefix.hit_tokens > 0


async def test_the_next_turn_of_a_talk_begins_behind_the_answer() -> None:
    async with _parts() as it:
        (answer,) = await it.serve(_item("first"))
        before = it.snapshot().prefix.hit_tokens
        await it.serve(_item("next", more=[*answer, 5, 6, 7]))
        full = (1 + len(_COMMON) + len(answer) - 1) // 16 * 16
        assert it.snapshot().prefix.hit_tokens - before == full > 80
        cached = [it.gateway.endings[name].timings.cached_tokens for name in ("first", "next")]
        assert cached == [0, full]


async def test_another_tenant_and_new_weights_of_the_same_adapter_find_nothing() -> None:
    async with _parts() as it:
        old, new = it.store.add(_blob(seed=1)), it.store.add(_blob(seed=2))
        await it.serve(_item("a", adapter=old), _item("b", adapter=old, tenant="u"))
        await it.serve(_item("c", adapter=new), _item("d"))
        assert it.snapshot().prefix.hit_tokens == 0
        await it.serve(_item("e", adapter=old))
        assert it.snapshot().prefix.hit_tokens == 64


def _blob(*, seed: int = 1) -> Blob:
    """A random adapter that is strong enough to change what is told."""
    config = load_config(_FOLDER)
    random = torch.Generator().manual_seed(seed)
    rows = []
    for layer in range(config.num_layers):
        for module, (fan_in, fan_out) in linear_shapes(config).items():
            a = torch.randn(4, fan_in, generator=random) * 0.2
            b = torch.randn(4, fan_out, generator=random) * 0.2
            data = a.numpy().tobytes(), b.numpy().tobytes()
            rows.append(LoraRows(layer, module, 4, 1.0, fan_in, fan_out, *data))
    return Blob(encode(rows, dtype="F32"), 4)
