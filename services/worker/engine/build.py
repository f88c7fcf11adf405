"""Builds the engine of a model folder: its shape, its executor, the account of its memory."""

from dataclasses import replace
from pathlib import Path

import torch

from services.common.base_model import ModelConfig, ModelNotFoundError, load_config, model_identity
from services.worker.engine.api import EngineInfo, EngineSettings
from services.worker.engine.cuda_tier import cuda_tier
from services.worker.engine.executor import Executor
from services.worker.engine.kv import PagedCache, bytes_per_token
from services.worker.engine.model import Model, Weights
from services.worker.engine.parallel_group import ShardGroup
from services.worker.engine.runner import ModelEngine
from services.worker.engine.sizing import EngineMemoryError, context_tokens, pool_blocks
from services.worker.engine.tiers import native_tier
from services.worker.engine.torch_executor import TorchExecutor
from services.worker.native.library import Unavailable

_DEFAULT_MEMORY_BYTES = 2 * 2**30


def build_model_engine(settings: EngineSettings) -> ModelEngine:
    """Load the model of a folder.

    Raises BaseModelError, ValueError and, for a model over several devices, EngineLostError.
    """
    if settings.model is None:
        raise ModelNotFoundError("an engine with a model needs a model folder")
    if settings.tensor_parallel > 1:
        return _split_engine(settings, settings.model)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config = load_config(settings.model)
    info = describe(settings, settings.model, config)
    try:
        return _engine(settings, config, info)
    except torch.OutOfMemoryError as error:
        raise EngineMemoryError(str(error).partition("\n")[0]) from error


def _split_engine(settings: EngineSettings, folder: Path) -> ModelEngine:
    from services.worker.engine.parallel import build_parallel_engine

    try:
        return build_parallel_engine(settings, folder)
    except torch.OutOfMemoryError as error:
        raise EngineMemoryError(str(error).partition("\n")[0]) from error


def _engine(settings: EngineSettings, config: ModelConfig, info: EngineInfo) -> ModelEngine:
    native = native_tier(settings, config, info)
    if not isinstance(native, Unavailable):
        return ModelEngine(replace(info, description=native.description), native)
    if settings.device == "cuda":
        return _cuda_engine(settings, config, info)
    without_native = native.reason
    executor = torch_executor(settings, config, info)
    return ModelEngine(
        replace(info, description=executor.description, without_native=without_native), executor
    )


def _cuda_engine(settings: EngineSettings, config: ModelConfig, info: EngineInfo) -> ModelEngine:
    tier = cuda_tier(settings, config, info)
    if not isinstance(tier, Unavailable):
        executor, accounted = tier
        return ModelEngine(accounted, executor)
    fallback = torch_executor(settings, config, info)
    description = f"{fallback.description}: {tier.reason}"
    return ModelEngine(replace(info, description=description), fallback)


def torch_executor(
    settings: EngineSettings,
    config: ModelConfig,
    info: EngineInfo,
    *,
    group: ShardGroup | None = None,
) -> Executor:
    """Of a whole model or, in a group, of one shard, of which `config` and `info` are."""
    assert settings.model is not None
    dtype: torch.dtype = getattr(torch, settings.dtype)
    device = torch.device(settings.device) if group is None else group.device
    shard = None if group is None else group.shard
    weights = Weights(settings.model, dtype=dtype, device=device, shard=shard)
    model = Model(config, weights, max_positions=info.max_context_tokens, dtype=dtype, group=group)
    cache = PagedCache(
        config,
        blocks=info.pool_blocks,
        block_tokens=info.block_tokens,
        dtype=dtype,
        device=device,
    )
    return TorchExecutor(model, cache, dtype=dtype, device=device)


def describe(settings: EngineSettings, folder: Path, config: ModelConfig) -> EngineInfo:
    """`config`: of what one device holds. Raises ValueError for too little memory."""
    identity = model_identity(folder)
    memory_bytes = settings.memory_bytes or _DEFAULT_MEMORY_BYTES
    dtype: torch.dtype = getattr(torch, settings.dtype)
    block_bytes = settings.block_tokens * bytes_per_token(config, dtype)
    return EngineInfo(
        description="",  # the executor's, which needs the rest
        model_name=identity.name,
        model_digest=identity.digest,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_sequences=settings.max_sequences,
        max_context_tokens=context_tokens(settings.max_context_tokens, config),
        pool_blocks=pool_blocks(memory_bytes, block_bytes),
        block_tokens=settings.block_tokens,
        block_bytes=block_bytes,
        num_layers=config.num_layers,
    )
