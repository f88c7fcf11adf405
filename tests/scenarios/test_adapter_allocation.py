"""Memory that can't be had, at every place where an adapter's load asks for some.

The load fails with a reason, the others notice nothing, nothing is held afterwards, and the same
adapter loads when there is memory again. `bench` checks at its end that nothing leaked.
"""

import asyncio
import dataclasses
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from services.common.adapter_container import ContainerHeader, read_header
from services.common.base_model import load_config
from services.common.errors import Reason
from services.worker import arena
from services.worker.engine import AdapterIncompatibleError
from services.worker.engine.simulated import SimulatedEngine
from services.worker.intake import COPIES_MAX, parts
from tests.support.peft_folders import write_tiny_model
from tests.support.worker_peers import INFO, QUICK, Bench, bench, make_blob, work_item

ADAPTER = make_blob(1, layers=INFO.num_layers)
BESIDE = make_blob(2, rank=8, layers=INFO.num_layers)
PARTS = [
    0,
    *parts(INFO.num_layers, COPIES_MAX),
]  # the engine hears of an adapter, and then of its layers
TOKENS = 150


class FullEngine(SimulatedEngine):
    """Has no memory for one part of one adapter while it is told so."""

    def __init__(self, pool_blocks: int = INFO.pool_blocks) -> None:
        super().__init__(dataclasses.replace(INFO, pool_blocks=pool_blocks), QUICK)
        self.fails_at: int | None = None
        self.failures = 0
        self.error: Callable[[str], Exception] = MemoryError

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        self._check(digest, 0)
        super().begin_adapter(digest, header, payload, blocks=blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._check(digest, layers)
        super().extend_adapter(digest, layers)

    def _check(self, digest: str, layers: int) -> None:
        if digest == ADAPTER.digest and layers == self.fails_at:
            self.failures += 1
            raise self.error("none left")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError, Reason.TOO_MANY_REQUESTS),
        (AdapterIncompatibleError, Reason.ADAPTER_BASE_MISMATCH),
    ],
)
async def test_an_engine_without_memory_for_a_part_of_an_adapter_fails_that_load_only(
    error: Callable[[str], Exception], reason: Reason, part: int
) -> None:
    engine = FullEngine()
    engine.fails_at, engine.error = part, error
    async with bench(engine=engine) as it:
        await _fails_and_comes_back(it, engine, reason, pace=_hand_over_layer_by_layer)


@pytest.mark.parametrize("part", PARTS)
async def test_an_adapter_in_host_memory_stays_there_when_the_device_has_no_memory(
    part: int,
) -> None:
    engine = FullEngine(pool_blocks=28)  # not enough for both adapters beside the requests
    async with bench(engine=engine) as it:
        gateway = await it.gateway()
        for number, blob in enumerate((ADAPTER, BESIDE)):
            item = work_item(f"first-{number}", adapter=it.store.add(blob))
            await it.scheduler.dispatch(item)
            await gateway.ended(item.request_id)
        assert ADAPTER.digest not in it.engine.adapters
        assert ADAPTER.digest in it.worker.residency.near()
        downloads = len(it.store.offsets)

        engine.fails_at = part
        await it.scheduler.dispatch(work_item("fails", adapter=ADAPTER.ref))
        assert (await gateway.ended("fails")).error.reason == Reason.TOO_MANY_REQUESTS
        assert ADAPTER.digest in it.worker.residency.near()
        engine.fails_at = None
        await it.scheduler.dispatch(work_item("again", adapter=ADAPTER.ref))
        assert not (await gateway.ended("again")).HasField("error")
        assert len(it.store.offsets) == downloads


@pytest.mark.parametrize("error", [MemoryError, ValueError])
@pytest.mark.parametrize("host_cache_bytes", [0, 2000])
async def test_no_memory_outside_the_arena_fails_that_load_only(
    host_cache_bytes: int, error: Callable[[str], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FullEngine()
    mapping, calls = arena._mapping, 0

    def no_mapping(size_bytes: int) -> memoryview:
        nonlocal calls
        if size_bytes != len(ADAPTER.data):
            return mapping(size_bytes)
        calls += 1
        raise error("no mapping can be had")

    async with bench(engine=engine, host_cache_bytes=host_cache_bytes) as it:
        monkeypatch.setattr(arena, "_mapping", no_mapping)

        def heal() -> None:
            assert calls == 1
            monkeypatch.setattr(arena, "_mapping", mapping)

        await _fails_and_comes_back(it, engine, Reason.TOO_MANY_REQUESTS, heal=heal)
        assert it.worker.residency.near() == frozenset()


def test_a_device_that_is_full_says_so_in_the_engines_words(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from services.worker.lora.weights import AdapterWeights

    blob = bytearray(make_blob(1, width=32).data)
    header = read_header(blob)
    write_tiny_model(tmp_path)

    def full(rows: object, dtype: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    weights = AdapterWeights(
        header,
        memoryview(blob)[header.payload_offset :],
        load_config(tmp_path),
        dtype=torch.float32,
        transfer=cast("Any", full),
    )
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        weights.extend(1)
    assert weights.ready_layers == 0


async def test_an_arena_that_can_not_be_mapped_is_said_at_the_start() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        "--engine=simulated",
        f"--host-cache-bytes={2**62}",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert b"cannot_start" in output
    assert str(2**62).encode() in output
    assert b"Traceback" not in output


async def _hand_over_layer_by_layer(it: Bench, engine: FullEngine) -> None:
    """The next layer comes when the engine has had the one before, or could not have it."""
    header = read_header(ADAPTER.data)
    layer_bytes = header.payload_bytes // INFO.num_layers
    gates: dict[int, asyncio.Event] = {}
    for layers in PARTS[1:-1]:
        # The message that has the end of a layer comes, and the one after that waits.
        end = header.payload_offset + layers * layer_bytes
        gates[layers] = it.store.pauses_at[end + it.store.CHUNK_BYTES] = asyncio.Event()
    for layers, gate in gates.items():
        while not engine.failures and it.engine.adapters.get(ADAPTER.digest) != layers:
            await asyncio.sleep(0.002)
        gate.set()


async def _at_once(it: Bench, engine: FullEngine) -> None:
    """All of the adapter comes as fast as it can."""


async def _fails_and_comes_back(
    it: Bench,
    engine: FullEngine,
    reason: Reason,
    *,
    heal: Callable[[], None] | None = None,
    pace: Callable[[Bench, FullEngine], Awaitable[None]] = _at_once,
) -> None:
    """The load fails under a running request and a loaded adapter; then it is tried again."""
    gateway = await it.gateway()
    refs = [it.store.add(blob) for blob in (ADAPTER, BESIDE)]
    beside = work_item("beside", max_tokens=TOKENS, adapter=refs[1])
    await it.scheduler.dispatch(beside)
    await gateway.has_tokens("beside", 2)

    fails = [work_item(f"fails-{number}", adapter=refs[0]) for number in range(3)]
    await it.scheduler.dispatch(*fails)
    await pace(it, engine)
    await gateway.ended(*(item.request_id for item in fails))
    for item in fails:
        told = gateway.endings[item.request_id].error
        assert (told.reason, told.stage) == (reason, "adapter_load")
        assert told.HasField("retry_after_s") == (reason is Reason.TOO_MANY_REQUESTS)
    await it.until(lambda: it.engine.adapters.keys() == {BESIDE.digest})
    it.worker.residency.check_integrity()

    engine.fails_at = None
    if heal is not None:
        heal()
    await it.scheduler.dispatch(work_item("again", adapter=refs[0]))
    assert not (await gateway.ended("again")).HasField("error")
    await gateway.ended("beside")
    assert len(gateway.tokens["beside"]) == TOKENS
    assert it.engine.adapters.keys() == {ADAPTER.digest, BESIDE.digest}
