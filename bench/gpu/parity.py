"""Whether the CUDA executor computes what plain torch computes, on a small random model.

Adapters of mixed ranks and base rows, prompts of several lengths, then decoding. What is compared
are log-probabilities of the whole vocabulary; the reference is plain torch in fp32.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu.extent import Extent
from bench.gpu.random_model import adapter_header, payload, write_model
from bench.gpu.served import Served
from bench.report import Row, Target
from services.common.base_model import load_config
from services.worker.engine.api import EngineSettings, SampledToken, Sampling
from services.worker.engine.build import describe, torch_executor
from services.worker.engine.cuda_executor import CudaExecutor
from services.worker.engine.model import Weights
from services.worker.engine.runner import ModelEngine
from services.worker.lora.device_pool import accounted_block_bytes

_RANKS = (8, 12, 40, 1)
_STEPS = 2
_PROMPT_TOKENS = 37
# Largest difference of a log-probability: rounding, of values whose logits are of order 10.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.7}


def compare(extent: Extent) -> tuple[list[Row], list[Target]]:
    """Both executors in each dtype, against plain torch in fp32."""
    rows: list[Row] = []
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, extent.small)
        expected = _log_probabilities(folder, extent, torch.float32, is_plain=True)
        for dtype in extent.parity_dtypes:
            for is_plain in (True, False):
                if is_plain and dtype == torch.float32:
                    continue
                got = _log_probabilities(folder, extent, dtype, is_plain=is_plain)
                kind = str(dtype).removeprefix("torch.")
                executor = "torch" if is_plain else "triton"
                error = float((got - expected).abs().max())
                same = float((got.argmax(1) == expected.argmax(1)).float().mean())
                rows.append(
                    {
                        "parity": executor,
                        "dtype": kind,
                        "largest_error": error,
                        "same_first_token": same,
                        "tolerance": _TOLERANCE[dtype],
                    }
                )
                if not is_plain:
                    targets.append(
                        Target(
                            f"parity with plain torch in fp32, {kind}",
                            _TOLERANCE[dtype],
                            error,
                            "nats",
                            is_upper=True,
                        )
                    )
    return rows, targets


def _log_probabilities(
    folder: Path, extent: Extent, dtype: torch.dtype, *, is_plain: bool
) -> torch.Tensor:
    """`[tokens, vocab]`"""
    served = _served(folder, extent, dtype, is_plain=is_plain)
    ranks = _RANKS if extent.is_gpu else _RANKS[:1]
    torch.manual_seed(2)
    for rank in ranks:
        header = adapter_header(extent.small, rank, torch.float32)
        rows = payload(header.payload_bytes, torch.float32, is_pinned=extent.is_gpu)
        served.add_adapter(f"r{rank}", header, rows)
    adapters = [None, *(f"r{rank}" for rank in ranks)]
    asking = Sampling(logprobs=extent.small.vocab_size)
    tokens = _PROMPT_TOKENS if extent.is_gpu else 3
    first = served.open(2 * len(adapters) if extent.is_gpu else 2, tokens, adapters, asking)
    drawn = first + [one for _ in range(_STEPS if extent.is_gpu else 1) for one in served.decode()]
    return torch.tensor([_in_order(one) for one in drawn])


def _in_order(token: SampledToken) -> list[float]:
    return [logprob for _, logprob in sorted(token.top)]


def _served(folder: Path, extent: Extent, dtype: torch.dtype, *, is_plain: bool) -> Served:
    settings = EngineSettings(
        model=folder,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of the three
        device="cuda" if extent.is_gpu else "cpu",
        memory_bytes=2**26 if extent.is_gpu else 2**17,
        max_context_tokens=64,
        max_sequences=16 if extent.is_gpu else 2,
    )
    config = load_config(folder)
    info = describe(settings, folder, config)
    if is_plain:
        return Served(ModelEngine(info, torch_executor(settings, config, info)))
    weights = Weights(folder, dtype=dtype, device=extent.device)
    executor = CudaExecutor(
        config, weights, info, dtype=dtype, device=extent.device, tunings=extent.tunings
    )
    executor.pool.fill_(float("nan"))
    accounted = accounted_block_bytes(config, len(executor.pool) // info.pool_blocks)
    return Served(ModelEngine(replace(info, block_bytes=accounted), executor))
