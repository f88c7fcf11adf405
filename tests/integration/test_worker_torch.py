"""The worker on both tiers of the CPU, a real trained model: the tokens are the engine's own."""

import os
from pathlib import Path
from typing import Literal

import pytest

from services.worker.config import WorkerSettings

torch = pytest.importorskip("torch")

from calumma.common.v1 import common_pb2  # noqa: E402
from calumma.scheduler.v1.scheduler_pb2 import WorkItem  # noqa: E402
from services.common.adapter_container import LoraRows, encode  # noqa: E402
from services.common.base_model import linear_shapes, load_config  # noqa: E402
from services.worker.engine import (  # noqa: E402
    Engine,
    EngineSettings,
    Sampling,
    SequenceSpec,
    add_adapter,
    build_engine,
)
from services.worker.engine_thread import EngineThread  # noqa: E402
from services.worker.native.library import Unavailable  # noqa: E402
from services.worker.native.probe import find_library  # noqa: E402
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

pytestmark = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"stories260K is not in {_FOLDER}; set CALUMMA_SHARED"
)


@pytest.mark.parametrize("pool_bytes", [64 * 2**20, 700_000], ids=["ample", "preempting"])
@pytest.mark.parametrize("tier", ["torch", "native"])
async def test_tokens_through_the_worker_equal_those_of_the_engine_alone(
    pool_bytes: int, tier: Literal["torch", "native"], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype: Literal["float32", "bfloat16"] = "float32" if tier == "torch" else "bfloat16"
    if tier == "native" and isinstance(found := find_library(), Unavailable):
        pytest.skip(found.reason)
    opened: list[str] = []
    open_sequence = EngineThread.open_sequence

    def count(thread: EngineThread, spec: SequenceSpec) -> None:
        opened.append(spec.sequence_id)
        open_sequence(thread, spec)

    monkeypatch.setattr(EngineThread, "open_sequence", count)
    store, scheduler = await StorePeer().listen(), await SchedulerPeer().listen()
    settings = WorkerSettings(
        listen="127.0.0.1:0",
        scheduler=scheduler.address,
        adapter_store=store.address,
        model=str(_FOLDER),
        device="cpu",
        dtype=dtype,
        tier=tier,
        threads=1,
        memory_bytes=pool_bytes,
        prefill_tokens_per_step=16,
    )
    blobs = [_blob(rank, seed) for rank, seed in ((4, 1), (8, 2))]
    worker = await start(settings)
    gateway = GatewayPeer(worker.address)
    try:
        await scheduler.attached()
        await gateway.open()
        refs = [store.add(blob) for blob in blobs]
        adapters = [None, *refs]
        await scheduler.prefetch(*refs)
        await scheduler.until(lambda: any(len(it.resident) == 2 for it in scheduler.statuses))
        items = [
            work_item(f"r{i}", tokens=1 + 9 * i, max_tokens=80, adapter=adapters[i % 3])
            for i in range(9)
        ]
        for item in items:
            item.token_ids[0] = 1
            item.predicted_output_tokens = 1
        await scheduler.dispatch(*items)
        await gateway.ended(*(item.request_id for item in items))
        engine = build_engine(EngineSettings(model=_FOLDER, dtype=dtype, tier=tier, threads=1))
        for blob in blobs:
            add_adapter(engine, blob.digest, bytearray(blob.data))
        alone = {item.request_id: _alone(engine, item) for item in items}
        assert gateway.tokens == alone
        assert (len(opened) > len(items)) == (pool_bytes == 700_000)
        assert len({tuple(tokens[:8]) for tokens in alone.values()}) > 3
        assert gateway.endings["r0"].finish_reason == common_pb2.FINISH_REASON_LENGTH
    finally:
        await gateway.close()
        await worker.stop(1.0)
        await scheduler.close()
        await store.close()


def _alone(engine: Engine, item: WorkItem) -> list[int]:
    digest = item.adapter.digest if item.HasField("adapter") else None
    sampling = Sampling(seed=item.sampling.seed)
    prompt = tuple(item.token_ids)
    spec = SequenceSpec(item.request_id, prompt, len(prompt), digest, sampling, 80)
    return tokens_alone(engine, spec)


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
