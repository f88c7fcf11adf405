"""What the native step's tests share: engines on it, and the logits of every row that they run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from services.common.adapter_container import LoraRows, encode
from services.common.base_model import ModelConfig, linear_shapes
from services.worker.engine import EngineSettings, build_engine
from services.worker.engine.executor import Executor, Pass, Segment
from services.worker.engine.native_executor import NativeExecutor, NativeScores
from services.worker.engine.runner import ModelEngine
from services.worker.native.build import NoCompilerError, build
from services.worker.native.library import Unavailable
from services.worker.native.probe import find_library
from tests.engine.engine_support import OwnedEngine

Floats = NDArray[np.float32]

MEDIUM_VOCAB: Final = 1003


def _why_not() -> str:
    """Empty where the native step can be tested. Sources that do not compile are an error."""
    try:
        build()
    except NoCompilerError as error:
        return str(error)
    found = find_library()
    return found.reason if isinstance(found, Unavailable) else ""


needs_native = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def native_engine(folder: Path, **settings: Any) -> OwnedEngine:
    """In bf16; two threads unless told otherwise."""
    options: dict[str, Any] = {"threads": 2} | settings
    engine = build_engine(EngineSettings(model=folder, tier="native", **options))
    assert isinstance(engine, ModelEngine)
    return OwnedEngine(engine)


def torch_tier(folder: Path, **settings: Any) -> OwnedEngine:
    """The other tier, in bf16."""
    engine = build_engine(EngineSettings(model=folder, tier="torch", **settings))
    assert isinstance(engine, ModelEngine)
    return OwnedEngine(engine)


def executor_of(engine: OwnedEngine) -> NativeExecutor:
    executor = engine.engine._executor
    assert isinstance(executor, NativeExecutor)
    return executor


def medium_model(folder: Path, *, layers: int = 2) -> PreTrainedModel:
    """Random, with matrices of the sizes at which work is split between threads and tiles."""
    config = LlamaConfig(
        vocab_size=MEDIUM_VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    torch.manual_seed(13)
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    model.save_pretrained(folder)
    return model


@dataclass(slots=True)
class Context:
    """A sequence as executors see one: its tokens, and how many of them are computed."""

    token_ids: Sequence[int]
    blocks: Sequence[int]
    digest: str | None = None
    computed: int = 0
    logits: list[Floats] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.computed == len(self.token_ids)

    def next_segment(self, rows: int) -> Segment:
        rows = min(rows, len(self.token_ids) - self.computed)
        return Segment(self.digest, self.computed, rows, self.blocks)

    @property
    def all_logits(self) -> Floats:
        return np.concatenate(self.logits)


def pass_of(contexts: Mapping[int, Context], segments: Mapping[int, Segment]) -> Pass:
    """All rows of these segments, each of which wants its logits."""
    token_ids = [
        token
        for key, segment in segments.items()
        for token in contexts[key].token_ids[segment.start : segment.end]
    ]
    positions = [p for segment in segments.values() for p in range(segment.start, segment.end)]
    return Pass(
        segments=tuple(segments.values()),
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        wanted=np.arange(len(token_ids), dtype=np.int32),
    )


def compute(
    executor: Executor, contexts: Sequence[Context], *, layers: int, chunks: Sequence[int]
) -> None:
    """Compute all tokens of all contexts together. `chunks`: rows per step, by turns.

    The turns of two contexts differ, so one context's decode meets another one's chunk. The
    logits `[tokens, vocab]` are in `Context.all_logits` then.
    """
    step = 0
    while unfinished := {k: c for k, c in enumerate(contexts) if not c.is_done}:
        segments = {
            key: context.next_segment(chunks[(step + key) % len(chunks)])
            for key, context in unfinished.items()
        }
        step += 1
        in_order = dict(sorted(segments.items(), key=lambda item: (item[1].rows, item[1].end)))
        part = pass_of(dict(enumerate(contexts)), in_order)
        scores = executor.run([part], [layers])
        logits = logits_of(scores, part.num_rows)
        first = 0
        for key, segment in in_order.items():
            contexts[key].logits.append(logits[first : first + segment.rows])
            contexts[key].computed = segment.end
            first += segment.rows


def logits_of(scores: object, rows: int) -> Floats:
    """A copy of what sampling would see."""
    if isinstance(scores, NativeScores):
        parts = [logits.copy() for _, logits in scores._logits(range(rows))]
        return np.concatenate(parts)
    logits: torch.Tensor = scores._logits  # type: ignore[attr-defined]  # the torch tier's
    return logits.float().numpy().copy()


def linear_blob(
    config: ModelConfig, rank: int, *, seed: int = 0, value: float | None = None
) -> bytearray:
    """An adapter of all linears in bf16: random rows, or rows of one value."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)

    def row_bytes(width: int) -> bytes:
        rows = torch.randn(rank, width, generator=generator) * 0.1
        if value is not None:
            rows.fill_(value)
        return bytes(rows.bfloat16().view(torch.uint8).numpy())

    rows = [
        LoraRows(layer, module, rank, 1.5, *shape, row_bytes(shape[0]), row_bytes(shape[1]))
        for layer in range(config.num_layers)
        for module, shape in linear_shapes(config).items()
    ]
    return bytearray(encode(rows, dtype="BF16"))


def block_tables(count: int, blocks_each: int, *, seed: int = 0) -> Iterator[list[int]]:
    """Block ids of contexts, none twice, in no order."""
    ids = np.random.default_rng(seed).permutation(count * blocks_each).tolist()
    for index in range(count):
        yield ids[index * blocks_each : (index + 1) * blocks_each]


def untouched(context: Context) -> Context:
    """The same context, of which nothing is computed yet."""
    return replace(context, computed=0, logits=[])
