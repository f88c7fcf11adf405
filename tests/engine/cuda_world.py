"""What the tests of the CUDA executor share: it and plain torch, with the same model and adapters.

Without a GPU the kernels run in Triton's interpreter, a thousand times slower: models and prompts
are as small as they can be. The pool is full of NaN where nothing was written.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from services.common.adapter_container import EMBEDDING, EMBEDDING_LAYER, HEAD, LoraRows, encode
from services.common.base_model import LINEARS, linear_shapes, load_config, outer_shapes
from services.worker.engine.api import EngineInfo, EngineSettings, SampledToken
from services.worker.engine.build import describe, torch_executor
from services.worker.engine.cuda_executor import CudaExecutor
from services.worker.engine.cuda_lora import Regime
from services.worker.engine.cuda_metadata import Tunings
from services.worker.engine.model import Weights
from services.worker.engine.runner import ModelEngine
from services.worker.lora.device_pool import accounted_block_bytes
from services.worker.lora.triton_lora import DECODE_TUNING, PREFILL_TUNING
from tests.engine.engine_support import DType, OwnedEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}


def write_model(folder: Path, *, has_head_norms: bool = False, has_biases: bool = False) -> None:
    """Two layers with random weights."""
    torch.manual_seed(5)
    config: Any = Qwen3Config(**_SHAPE, tie_word_embeddings=False) if has_head_norms else None
    config = config or LlamaConfig(
        **_SHAPE, attention_bias=has_biases, mlp_bias=has_biases, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def adapter_blob(
    folder: Path, rank: int, *, is_outer: bool = False, dtype: str = "F32", part: int = 1
) -> bytearray:
    """A random adapter of every linear, its ranks `rank` and a `part` of it by turns."""
    config = load_config(folder)
    shapes = linear_shapes(config) | outer_shapes(config)
    random = np.random.default_rng(rank)

    def rows(layer: int, module: str, index: int) -> LoraRows:
        inputs, outputs = shapes[module]
        own = max(1, rank // part) if index % 2 else rank
        a, bt = (_bits(random.normal(0, 0.15, own * width), dtype) for width in (inputs, outputs))
        return LoraRows(layer, module, own, 0.5 + layer, inputs, outputs, a, bt)

    places = [(layer, module) for layer in range(config.num_layers) for module in LINEARS]
    if is_outer:
        places = [(EMBEDDING_LAYER, EMBEDDING), *places, (config.num_layers, HEAD)]
    return bytearray(encode((rows(*p, i) for i, p in enumerate(places)), dtype=dtype))


def _bits(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of fp32
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f4").tobytes()


def cuda_engine(
    folder: Path,
    *,
    dtype: DType = "float32",
    regime: Regime | None = None,
    block_tokens: int = 16,
    max_sequences: int = 8,
) -> OwnedEngine:
    settings = _settings(folder, dtype, block_tokens, max_sequences)
    config = load_config(folder)
    info = describe(settings, folder, config)
    kind: torch.dtype = getattr(torch, dtype)
    executor = CudaExecutor(
        config,
        Weights(folder, dtype=kind, device=DEVICE),
        info,
        dtype=kind,
        device=DEVICE,
        regime=regime,
        tunings=_few_programs(),
    )
    executor.pool.fill_(float("nan"))
    accounted = accounted_block_bytes(config, len(executor.pool) // info.pool_blocks)
    return OwnedEngine(ModelEngine(replace(info, block_bytes=accounted), executor))


def _few_programs() -> Tunings:
    """Where programs run one after the other, those without work are a waste."""
    if DEVICE.type == "cuda":
        return Tunings()
    few = {"shrink_programs": 3, "expand_programs": 3, "splits": 2, "item_pages": 4}
    return Tunings(replace(DECODE_TUNING, **few), replace(PREFILL_TUNING, **few, tile_rows=32))


def torch_engine(folder: Path, *, dtype: DType = "float32") -> OwnedEngine:
    settings = _settings(folder, dtype, 16, 8)
    config = load_config(folder)
    info: EngineInfo = describe(settings, folder, config)
    return OwnedEngine(ModelEngine(info, torch_executor(settings, config, info)))


def _settings(folder: Path, dtype: DType, block_tokens: int, max_sequences: int) -> EngineSettings:
    return EngineSettings(
        model=folder,
        dtype=dtype,
        device="cuda" if DEVICE.type == "cuda" else "cpu",
        memory_bytes=2**23,
        max_context_tokens=64,
        max_sequences=max_sequences,
        block_tokens=block_tokens,
    )


def distributions(outputs: dict[str, list[SampledToken]]) -> dict[str, torch.Tensor]:
    """Log-probabilities `[tokens, vocab]` of sequences that asked for all of them."""
    return {
        name: torch.tensor([[p for _, p in sorted(token.top)] for token in output])
        for name, output in outputs.items()
    }
