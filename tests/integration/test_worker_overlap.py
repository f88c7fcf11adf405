"""Prompts that begin while their adapter still comes give the tokens that they give otherwise."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from services.common.adapter_container import LoraRows, encode  # noqa: E402
from services.common.base_model import linear_shapes, load_config  # noqa: E402
from services.worker.config import WorkerSettings  # noqa: E402
from services.worker.engine import (  # noqa: E402
    EngineSettings,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
    build_engine,
)
from services.worker.engine_thread import EngineThread, StepEnded  # noqa: E402
from services.worker.service import start  # noqa: E402
from tests.support.worker_peers import (  # noqa: E402
    Blob,
    GatewayPeer,
    SchedulerPeer,
    StorePeer,
    tokens_alone,
    work_item,
)

_ROOT = Path(__file__).parents[2]
_SHARED = Path(os.environ.get("CALUMMA_SHARED", _ROOT.parent / "shared"))
_FOLDER = _SHARED / "data" / "models" / "stories260K" / "fp32"
MAX_TOKENS = 30

pytestmark = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"stories260K is not in {_FOLDER}; set CALUMMA_SHARED"
)


async def test_a_prompt_computed_behind_its_adapter_has_the_tokens_of_a_warm_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts: list[StepItem] = []
    run_step = EngineThread.run_step

    def note(
        thread: EngineThread, items: Sequence[StepItem], on_end: Callable[[StepEnded], None]
    ) -> None:
        parts.extend(item for item in items if item.until_layer is not None)
        run_step(thread, items, on_end)

    monkeypatch.setattr(EngineThread, "run_step", note)
    store, scheduler = await StorePeer().listen(), await SchedulerPeer().listen()
    settings = WorkerSettings(
        listen="127.0.0.1:0",
        scheduler=scheduler.address,
        adapter_store=store.address,
        model=str(_FOLDER),
        device="cpu",
        dtype="float32",
        threads=1,
        memory_bytes=64 * 2**20,
    )
    blobs = [_blob(rank, seed) for rank, seed in ((4, 1), (8, 2))]
    worker = await start(settings)
    gateway = GatewayPeer(worker.address)
    try:
        await scheduler.attached()
        await gateway.open()
        for blob in blobs:
            store.pauses_at |= {len(blob.data) * n // 4: asyncio.Event() for n in (2, 3)}
        items = [
            work_item(f"r{i}", tokens=5 + 9 * i, max_tokens=MAX_TOKENS, adapter=store.add(blob))
            for i, blob in enumerate(blobs)
        ]
        base = work_item("base", tokens=4, max_tokens=400)
        for item in items:
            item.token_ids[0] = 1
        await scheduler.dispatch(base, *items)
        async with asyncio.timeout(20):
            while not parts:
                await asyncio.sleep(0.002)
        for event in store.pauses_at.values():
            event.set()
            await asyncio.sleep(0.05)  # for the next layers to be used
        await gateway.ended(*(item.request_id for item in items))
        assert {part.sequence_id for part in parts} <= {"r0#1", "r1#1"}
        engine = build_engine(EngineSettings(model=_FOLDER, dtype="float32", threads=1))
        for item, blob in zip(items, blobs, strict=True):
            add_adapter(engine, blob.digest, bytearray(blob.data))
            prompt = tuple(item.token_ids)
            sampling = Sampling(seed=item.sampling.seed)
            spec = SequenceSpec("alone", prompt, len(prompt), blob.digest, sampling, MAX_TOKENS)
            assert gateway.tokens[item.request_id] == tokens_alone(engine, spec)
    finally:
        await gateway.close()
        await worker.stop(1.0)
        await scheduler.close()
        await store.close()


def _blob(rank: int, seed: int) -> Blob:
    """A random adapter that is strong enough to change what is told."""
    config = load_config(_FOLDER)
    random = torch.Generator().manual_seed(seed)
    rows = []
    for layer in range(config.num_layers):
        for module, (fan_in, fan_out) in linear_shapes(config).items():
            a = torch.randn(rank, fan_in, generator=random) * 0.2
            b = torch.randn(rank, fan_out, generator=random) * 0.2
            data = a.numpy().tobytes(), b.numpy().tobytes()
            rows.append(LoraRows(layer, module, rank, 1.0, fan_in, fan_out, *data))
    return Blob(encode(rows, dtype="F32"), rank)
