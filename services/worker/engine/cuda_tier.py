"""What computes a model on a CUDA device: kernels of our own where they can, else plain torch."""

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from services.common.base_model import ModelConfig
from services.worker.engine.api import EngineInfo, EngineSettings
from services.worker.engine.kv import bytes_per_token
from services.worker.engine.model import Weights
from services.worker.lora.device_pool import accounted_block_bytes, has_aligned_rows
from services.worker.native.library import Unavailable

if TYPE_CHECKING:
    from services.worker.engine.cuda_executor import CudaExecutor


def cuda_tier(
    settings: EngineSettings, config: ModelConfig, info: EngineInfo
) -> "tuple[CudaExecutor, EngineInfo] | Unavailable":
    """The executor with what it says of its blocks, or why not.

    Raises BaseModelError for the weights and ValueError for the memory.
    """
    reason = _obstacle(settings, config, info)
    if reason is not None:
        return Unavailable(reason)
    # Triton is not everywhere, and takes a second to import.
    from services.worker.engine.cuda_executor import CudaExecutor

    assert settings.model is not None
    dtype: torch.dtype = getattr(torch, settings.dtype)
    device = torch.device(settings.device)
    weights = Weights(settings.model, dtype=dtype, device=device)
    executor = CudaExecutor(config, weights, info, dtype=dtype, device=device)
    executor.warm_up()
    return executor, replace(
        info,
        description=executor.description,
        block_bytes=accounted_block_bytes(config, _block_elements(settings, config)),
    )


def _obstacle(settings: EngineSettings, config: ModelConfig, info: EngineInfo) -> str | None:
    if settings.tier == "torch":
        return "the torch tier is asked for"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not has_aligned_rows(config):
        return "a linear's width is no multiple of 8"
    if accounted_block_bytes(config, _block_elements(settings, config)) < 1:
        return f"8 rank rows do not fit into a block of {info.block_bytes} bytes"
    return None


def _block_elements(settings: EngineSettings, config: ModelConfig) -> int:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return settings.block_tokens * bytes_per_token(config, dtype) // dtype.itemsize
