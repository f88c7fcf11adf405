"""Whole steps of the engine on a random model: base, mixed adapters, and adapters that come.

Times are those of `Engine.step` as a caller sees them: metadata, graph, sampling, the copy back.
*Retention*: tokens per second with adapters over those of the base model, same rows, by turns.
Its floor is what the bytes of the rank rows allow at the bandwidth that was measured.
"""

import gc
import time
from collections.abc import Callable
from itertools import cycle, islice
from threading import Thread

import numpy as np
import torch

from bench.gpu.ceilings import Ceilings
from bench.gpu.extent import Extent
from bench.gpu.random_model import RandomWeights, adapter_header, payload
from bench.gpu.served import Served
from bench.report import Row, Target
from services.worker.engine.api import EngineInfo, Sampling
from services.worker.engine.cuda_executor import CudaExecutor
from services.worker.engine.kv import bytes_per_token
from services.worker.engine.runner import ModelEngine
from services.worker.engine.sizing import weights_bytes
from services.worker.lora.device_pool import accounted_block_bytes

_PROMPT_TOKENS = 64
_BLOCK_TOKENS = 16
_RETENTION = {"8 x r16": 0.93, "32 x r16": 0.78, "32 x r8-128": 0.55}
_BASE_SHARE = 0.85
_SWAP_RATIO, _SWAP_P99 = 1.2, 1.05
_WARM_UP_STEPS = 3


def build(extent: Extent) -> Served:
    """The engine with a random model on the device."""
    config = extent.large
    block_bytes = _BLOCK_TOKENS * bytes_per_token(config, extent.dtype)
    elements = block_bytes // extent.dtype.itemsize
    info = EngineInfo(
        description="random",
        model_name="random",
        model_digest="",
        vocab_size=config.vocab_size,
        eos_token_ids=(),
        max_sequences=max(extent.decode_rows),
        max_context_tokens=1024 if extent.is_gpu else 128,
        pool_blocks=extent.pool_bytes // block_bytes,
        block_tokens=_BLOCK_TOKENS,
        block_bytes=accounted_block_bytes(config, elements),
        num_layers=config.num_layers,
    )
    weights = RandomWeights(extent.dtype, extent.device)
    executor = CudaExecutor(
        config, weights, info, dtype=extent.dtype, device=extent.device, tunings=extent.tunings
    )
    executor.warm_up()
    return Served(ModelEngine(info, executor))


def base(extent: Extent, served: Served, ceilings: Ceilings) -> tuple[list[Row], list[Target]]:
    """Decoding without adapters, by number of sequences."""
    config = extent.large
    read_bytes = weights_bytes(config, extent.dtype.itemsize)
    if not config.tie_embeddings:  # a row of the embedding for each token
        read_bytes -= config.vocab_size * config.hidden_size * extent.dtype.itemsize
    rows: list[Row] = []
    targets: list[Target] = []
    for count in extent.decode_rows:
        served.open(count, _prompt(extent), [None], Sampling())
        seconds = _steps_s(extent, served)
        served.close_all()
        share = read_bytes / float(np.median(seconds)) / ceilings.copy_bytes_s
        rows.append(_row("base", count, seconds, share_of_copy_bandwidth=share))
        if count == 1:
            name = "base decode of one sequence, share of copy bandwidth"
            targets.append(Target(name, _BASE_SHARE, share, ""))
    return rows, targets


def retention(
    extent: Extent, served: Served, ceilings: Ceilings, is_time_left: Callable[[], bool]
) -> tuple[list[Row], list[Target]]:
    """Decoding with sets of adapters against the base model, before and after each set."""
    rows: list[Row] = []
    targets: list[Target] = []
    for name, count, ranks in extent.lora_sets:
        if not is_time_left():
            rows.append(_row(f"{name}: skipped, no time was left", extent.lora_rows, []))
            continue
        own = list(islice(cycle(ranks), count))
        digests = _add(extent, served, own)
        before = _decoded(extent, served, [None])
        adapted = _decoded(extent, served, digests)
        after = _decoded(extent, served, [None])
        for digest in digests:
            served.remove_adapter(digest)
        base_s = float(np.median(before + after))
        lora_bytes = sum(
            adapter_header(extent.large, rank, extent.dtype).payload_bytes for rank in own
        )
        floor = base_s / (base_s + lora_bytes / ceilings.memory_bytes_s)
        kept = base_s / float(np.median(adapted))
        rows.append(_row(name, extent.lora_rows, adapted, retention=kept, retention_floor=floor))
        if name in _RETENTION:
            title = f"retention of base throughput, {extent.lora_rows} rows, {name}"
            targets.append(Target(title, _RETENTION[name], kept, ""))
    return rows, targets


def swaps(extent: Extent, served: Served, ceilings: Ceilings) -> tuple[list[Row], list[Target]]:
    """An adapter comes again and again while sequences decode."""
    header = adapter_header(extent.large, extent.swap_rank, extent.dtype)
    rows_of = payload(header.payload_bytes, extent.dtype, is_pinned=extent.is_gpu)
    plain_s = header.payload_bytes / ceilings.host_bytes_s
    served.open(extent.lora_rows, _prompt(extent), [None], Sampling())
    quiet = _steps_s(extent, served)
    idle_s = _swaps_s(extent, served, header.payload_bytes, rows_of)
    _remove_swapped(extent, served)
    busy_s: list[float] = []
    loader = Thread(
        target=lambda: busy_s.extend(_swaps_s(extent, served, header.payload_bytes, rows_of))
    )
    loader.start()
    beside = _timed_steps(served, 1)
    while loader.is_alive() and len(beside) < extent.steps * 10:
        beside += _timed_steps(served, 1)
    loader.join()
    _remove_swapped(extent, served)
    served.close_all()
    ratio = float(np.median(idle_s)) / plain_s
    slower = float(np.percentile(beside, 99) / np.percentile(quiet, 99))
    rows = [
        {
            "swap_in_MB": header.payload_bytes / 1e6,
            "plain_copy_ms": plain_s * 1e3,
            "alone_ms": float(np.median(idle_s)) * 1e3,
            "beside_steps_ms": float(np.median(busy_s)) * 1e3,
            "step_p99_ms": float(np.percentile(quiet, 99)) * 1e3,
            "step_p99_during_loads_ms": float(np.percentile(beside, 99)) * 1e3,
        }
    ]
    return rows, [
        Target("swap-in over a plain pinned copy", _SWAP_RATIO, ratio, "", is_upper=True),
        Target("p99 of steps during loads over without", _SWAP_P99, slower, "", is_upper=True),
    ]


def _swaps_s(extent: Extent, served: Served, size_bytes: int, rows_of: memoryview) -> list[float]:
    assert len(rows_of) == size_bytes
    header = adapter_header(extent.large, extent.swap_rank, extent.dtype)
    seconds: list[float] = []
    for index in range(extent.swaps):
        began_s = time.perf_counter()
        served.add_adapter(_swapped(index), header, rows_of)
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _remove_swapped(extent: Extent, served: Served) -> None:
    for index in range(extent.swaps):
        served.remove_adapter(_swapped(index))


def _swapped(index: int) -> str:
    return f"swapped {index}"


def _add(extent: Extent, served: Served, ranks: list[int]) -> list[str]:
    """Adapters of these ranks, with rows from one range of host memory."""
    headers = [adapter_header(extent.large, rank, extent.dtype) for rank in ranks]
    largest = max(header.payload_bytes for header in headers)
    rows_of = payload(largest, extent.dtype, is_pinned=extent.is_gpu)
    digests = [f"a{index}" for index in range(len(ranks))]
    for digest, header in zip(digests, headers, strict=True):
        served.add_adapter(digest, header, rows_of)
    return digests


def _decoded(extent: Extent, served: Served, adapters: list[str] | list[None]) -> list[float]:
    served.open(extent.lora_rows, _prompt(extent), adapters, Sampling())
    seconds = _steps_s(extent, served)
    served.close_all()
    return seconds


def _prompt(extent: Extent) -> int:
    return _PROMPT_TOKENS if extent.is_gpu else 2


def _steps_s(extent: Extent, served: Served) -> list[float]:
    _timed_steps(served, min(_WARM_UP_STEPS, extent.steps - 1))
    return _timed_steps(served, extent.steps)


def _timed_steps(served: Served, steps: int) -> list[float]:
    seconds: list[float] = []
    for _ in range(steps):
        began_s = time.perf_counter()
        served.decode()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _row(name: str, count: int, seconds: list[float], **values: float) -> Row:
    empty = dict.fromkeys(("share_of_copy_bandwidth", "retention", "retention_floor"))
    median_s = float(np.median(seconds)) if seconds else float("nan")
    return {
        "decode": name,
        "rows": count,
        "step_ms": median_s * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3 if seconds else float("nan"),
        "tokens_per_s": count / median_s,
        **(empty | values),
    }


def free_memory(extent: Extent) -> None:
    """What one part left, for the next one."""
    gc.collect()
    if extent.is_gpu:
        torch.cuda.empty_cache()
