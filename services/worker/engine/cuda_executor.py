"""The forward pass on CUDA: base products by cuBLAS, all else by kernels of our own.

One tensor on the device is the pool: its blocks hold keys and values, or rank rows of adapters. A
step that decodes is a graph (`cuda_graphs`); prompts, and what stops on its way through the layers,
run kernel by kernel. A step with both is a graph and then the prompts. Nothing is copied back to
the host but what the sampler drew, once, at the end of a step (`cuda_sampler`).

With TRITON_INTERPRET=1 all of it runs on the CPU, about a thousand times slower: for tests.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from services.common.adapter_container import ContainerHeader
from services.common.base_model import ModelConfig
from services.worker.engine.api import EngineInfo
from services.worker.engine.cuda_errors import device_errors
from services.worker.engine.cuda_graphs import DecodeGraphs
from services.worker.engine.cuda_lora import (
    DenseRows,
    Regime,
    RowsLora,
    SideStream,
    choose_regime,
)
from services.worker.engine.cuda_metadata import (
    PlannedAdapters,
    Tunings,
    packed,
    plan_adapters,
    ragged_parts,
    to_device,
    views_of,
)
from services.worker.engine.cuda_model import (
    CudaModel,
    DecodeRows,
    PromptRows,
    Residual,
    Rows,
    WeightSource,
)
from services.worker.engine.cuda_sampler import DeviceScores
from services.worker.engine.executor import Pass, Segment
from services.worker.engine.triton_attention import (
    DecodeScratch,
    PrefillPlan,
    attention_tuning,
    prefill_positions,
)
from services.worker.engine.triton_ops import CacheShape
from services.worker.lora.cpu import LoraSegment
from services.worker.lora.device_pool import AdapterPool
from services.worker.lora.outer import AdaptedRows, adapted_rows
from services.worker.lora.triton_lora import LoraStep, linear_groups, plane_elements_max


class CudaExecutor:
    """See `Executor`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        info: EngineInfo,
        *,
        dtype: torch.dtype,
        device: torch.device,
        regime: Regime | None = None,
        tunings: Tunings = Tunings(),  # noqa: B008  (frozen)
    ) -> None:
        """`regime`: how adapters are computed; None: as suits each step, in graphs where it can."""
        self._config = config
        self._device = device
        self._dtype = dtype
        self._regime = regime
        self._tunings = tunings
        self._cache = CacheShape(
            config.num_layers, config.num_kv_heads, info.block_tokens, config.head_dim
        )
        self._tuning = attention_tuning(_capability(device), config.head_dim)
        elements = info.pool_blocks * self._cache.block_elements
        self._pool = torch.zeros(elements, dtype=dtype, device=device)
        self._adapters = AdapterPool(config, self._pool, block_elements=self._cache.block_elements)
        self._groups = linear_groups(config)
        self._side = SideStream(device)
        self._model = CudaModel(
            config,
            weights,
            self._pool,
            cache=self._cache,
            tuning=self._tuning,
            max_positions=info.max_context_tokens,
        )
        self._graphs = DecodeGraphs(
            self._model,
            self._pool,
            self._adapters.tables,
            rows_max=info.max_sequences,
            table_blocks=-(-info.max_context_tokens // info.block_tokens),
            block_tokens=info.block_tokens,
            tuning=tunings.decode,
        )

    @property
    def description(self) -> str:
        return f"triton {self._device.type} {str(self._dtype).removeprefix('torch.')}"

    @property
    def pool(self) -> Tensor:
        """All values of all blocks, `[elements]`."""
        return self._pool

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile kernels and make graphs now, not in steps. Takes seconds to a minute."""
        if self._device.type == "cuda":
            self._graphs.warm_up()
            torch.cuda.synchronize(self._device)

    def begin_adapter(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None:
        with device_errors():
            self._adapters.begin(digest, header, payload, blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        with device_errors():
            self._adapters.extend(digest, layers)

    def remove_adapter(self, digest: str) -> None:
        self._adapters.remove(digest)

    def ready_layers(self, digest: str) -> int:
        return self._adapters[digest].ready_layers

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Nothing to do: no kernel reads behind the end of a context."""

    @torch.inference_mode()
    def run(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> DeviceScores | None:
        with device_errors():
            logits: list[Tensor] = []
            for rows, until in zip(passes, until_layers, strict=True):
                is_whole = rows.state is None and until == self._config.num_layers
                # A graph's logits last until its next run: a second pass does without.
                run = self._whole if is_whole and not logits else self._ragged
                logits += run(rows, until)
                rows.layers = until
            self._adapters.steps_queued()
        if not logits:
            return None
        return DeviceScores(logits[0] if len(logits) == 1 else torch.cat(logits))

    def _whole(self, rows: Pass, until: int) -> list[Tensor]:
        """All layers: those that decode as a graph, then the rest."""
        segments = rows.segments
        decoding = next((i for i, one in enumerate(segments) if one.rows > 1), len(segments))
        padding = self._graphs.padding(decoding)
        planned = plan_adapters(segments[:decoding], self._adapters, self._tunings, padding=padding)
        if not self._is_graph(segments[:decoding], planned):
            return self._ragged(rows, until)
        decoded = self._graphs.run(segments[:decoding], rows.token_ids[:decoding], planned)
        for adapted in self._outer(segments[:decoding], is_head=True):
            adapted.add_head(decoded.logits, decoded.x, slice(0, self._config.vocab_size))
        drawn = rows.wanted[rows.wanted < decoding]
        logits: list[Tensor] = []
        if len(drawn) == decoding:
            logits.append(decoded.logits)
        elif len(drawn):
            logits.append(decoded.logits.index_select(0, to_device(drawn, self._device)))
        if decoding < len(segments):
            rest = Pass(
                segments[decoding:],
                rows.token_ids[decoding:],
                rows.positions[decoding:],
                rows.wanted[rows.wanted >= decoding] - decoding,
            )
            logits += self._ragged(rest, until)
        return logits

    def _is_graph(self, segments: Sequence[Segment], planned: PlannedAdapters | None) -> bool:
        has_embedding = any(
            one.digest is not None and self._adapters[one.digest].embedding for one in segments
        )
        return (
            self._regime is None
            and not has_embedding
            and self._graphs.can_run(len(segments), planned)
        )

    def _ragged(self, rows: Pass, until: int) -> list[Tensor]:
        """Kernel by kernel, to a layer. Logits of the wanted rows if that is the last one."""
        parts, on_device = self._rows(rows)
        if rows.state is None:
            rows.state = self._embedded(rows, on_device)
        residual = rows.state
        assert isinstance(residual, Residual)
        self._model.run(residual, on_device, slice(rows.layers, until))
        if until < self._config.num_layers:
            return []
        rows.state = None
        if not len(rows.wanted):
            return []
        scored = self._model.head(residual.of_rows(parts["wanted"]))
        digests = [one.digest for one in rows.segments for _ in range(one.rows)]
        drawn = [Segment(digests[row], 0, 1, ()) for row in rows.wanted]
        for adapted in self._outer(drawn, is_head=True):
            adapted.add_head(scored.logits, scored.x, slice(0, self._config.vocab_size))
        return [scored.logits]

    def _embedded(self, rows: Pass, on_device: Rows) -> Residual:
        residual = self._model.embed(on_device.token_ids)
        for adapted in self._outer(rows.segments, is_head=False):
            adapted.add_embedding(residual.hidden, on_device.token_ids)
        return residual

    def _rows(self, rows: Pass) -> tuple[dict[str, Tensor], Rows]:
        arrays = ragged_parts(
            rows.segments,
            rows.token_ids,
            rows.positions,
            rows.wanted,
            block_tokens=self._cache.block_tokens,
            tile_positions=prefill_positions(self._config.num_heads, self._cache, self._tuning),
        )
        planned = plan_adapters(rows.segments, self._adapters, self._tunings)
        if planned is not None:
            arrays["work"] = planned.work.pack(planned.work.bucket)
        array, places = packed(arrays)
        parts = views_of(to_device(array, self._device), places)
        decode = prompts = None
        if "lengths" in parts:
            scratch = DecodeScratch.empty(
                len(parts["lengths"]), self._config.num_heads, self._config.head_dim, self._device
            )
            decode = DecodeRows(parts["blocks"], parts["lengths"], scratch)
        if "tiles" in parts:
            plan = PrefillPlan(parts["segments"], parts["tiles"])
            prompts = PromptRows(parts["prompt_blocks"], plan)
        lora = None if planned is None else self._lora(planned, parts["work"])
        ids = parts["token_ids"], parts["positions"], parts["slots"]
        return parts, Rows(*ids, decode, prompts, lora)

    def _lora(self, planned: PlannedAdapters, work: Tensor) -> RowsLora:
        shape, tuning = planned.work.bucket, planned.tuning
        planes = torch.empty(
            plane_elements_max(shape, tuning), dtype=torch.float32, device=self._device
        )
        step = LoraStep(self._pool, self._adapters.tables, work, planes, shape, tuning)
        regime = self._regime or choose_regime(planned.tile_pages, tile_rows=tuning.tile_rows)
        lora = RowsLora(regime, step, self._groups, self._side)
        return replace(lora, dense=self._dense(planned)) if regime is Regime.MASKED_DENSE else lora

    def _dense(self, planned: PlannedAdapters) -> DenseRows:
        tables = []
        for digest in planned.digests:
            adapter = self._adapters[digest]
            assert adapter.placement is not None
            tables.append(
                adapter.placement.table(
                    adapter.blocks,
                    block_elements=self._cache.block_elements,
                    num_layers=self._config.num_layers,
                )
            )
        return DenseRows(tables, planned.row_slots.tolist())

    def _outer(self, segments: Sequence[Segment], *, is_head: bool) -> list[AdaptedRows]:
        """Of the embedding or the head: the rows whose adapter has a pair there."""
        pairs = {}
        for digest in {one.digest for one in segments if one.digest is not None}:
            adapter = self._adapters[digest]
            if pair := adapter.head if is_head else adapter.embedding:
                pairs[digest] = pair
        if not pairs:
            return []
        row = 0
        rows: list[LoraSegment] = []
        for segment in segments:
            rows.append(LoraSegment(segment.digest, slice(row, row + segment.rows)))
            row += segment.rows
        return adapted_rows(rows, pairs, device=self._device)


def _capability(device: torch.device) -> int:
    """80, 90, 100; without CUDA, what kernels are tried as."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
