"""Overlap with the torch engine: tokens of a prompt in parts are those of the whole prompt."""

import asyncio
import os
from pathlib import Path
from typing import cast

import pytest

torch = pytest.importorskip("torch")

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
from services.worker.engine.simulated import SimulatedEngine  # noqa: E402
from tests.support.worker_peers import Blob, bench, tokens_alone, work_item  # noqa: E402

_ROOT = Path(__file__).parents[2]
_SHARED = Path(os.environ.get("CALUMMA_SHARED", _ROOT.parent / "shared"))
_FOLDER = _SHARED / "data" / "models" / "stories260K" / "fp32"

pytestmark = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"stories260K is not in {_FOLDER}; set CALUMMA_SHARED"
)


async def test_tokens_of_a_prompt_in_parts_are_those_of_the_whole_prompt() -> None:
    blob, engine = _blob(), _engine()
    add_adapter(engine, blob.digest, bytearray(blob.data))
    cold = work_item("cold", tokens=30, max_tokens=40, adapter=blob.ref)
    prompt = tuple(cold.token_ids)
    spec = SequenceSpec("cold", prompt, len(prompt), blob.digest, Sampling(), max_tokens=40)
    # The bench passes every call on, whichever engine it is.
    async with bench(engine=cast("SimulatedEngine", _engine())) as it:
        gateway = await it.gateway()
        it.store.add(blob)
        rest = it.store.pauses_at[len(blob.data) - 1] = asyncio.Event()
        await it.scheduler.dispatch(work_item("other", max_tokens=300))
        await it.scheduler.dispatch(cold)
        await it.until(lambda: bool(it.engine.parts))
        rest.set()
        await gateway.ended("cold", "other")
        assert gateway.tokens["cold"] == tokens_alone(engine, spec)


def _engine() -> Engine:
    return build_engine(EngineSettings(model=_FOLDER, dtype="float32", threads=1))


def _blob() -> Blob:
    """A random adapter that is strong enough to change what is told."""
    config = load_config(_FOLDER)
    random = torch.Generator().manual_seed(1)
    rows: list[LoraRows] = []
    for layer in range(config.num_layers):
        for module, (fan_in, fan_out) in linear_shapes(config).items():
            a = torch.randn(8, fan_in, generator=random) * 0.2
            b = torch.randn(8, fan_out, generator=random) * 0.2
            data = a.numpy().tobytes(), b.numpy().tobytes()
            rows.append(LoraRows(layer, module, 8, 1.0, fan_in, fan_out, *data))
    return Blob(encode(rows, dtype="F32"), 8)
