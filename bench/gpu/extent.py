"""How large everything is: for a large GPU, or for an interpreter on a CPU that is to end soon."""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from services.common.base_model import ModelConfig
from services.common.model_config import parse_config
from services.worker.engine.cuda_metadata import Tunings
from services.worker.lora.triton_lora import DECODE_TUNING

_LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED_RANKS: Final = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Extent:
    """`small`: of the model whose numbers are compared; `large`: of the one that is timed."""

    device: torch.device
    dtype: torch.dtype
    small: ModelConfig
    large: ModelConfig
    replays: int
    copy_bytes: int
    matrix: int  # rows and columns of a large product
    chain: int  # launches of a chain of empty kernels
    adapters: tuple[int, ...]  # active at once
    ranks: tuple[tuple[str, tuple[int, ...]], ...]  # by name, taken by turns
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_rows: tuple[int, ...]
    lora_rows: int  # of the steps whose retention is measured
    lora_sets: tuple[tuple[str, int, tuple[int, ...]], ...]  # name, adapters, ranks by turns
    steps: int
    swaps: int
    swap_rank: int
    pool_bytes: int  # of the engine that is timed
    parity_dtypes: tuple[torch.dtype, ...]
    tunings: Tunings

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def full() -> Extent:
    return Extent(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        small=_config(hidden=512, ffn=1024, layers=4, heads=8, kv_heads=2, dim=64, vocab=1024),
        large=_config(
            hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, dim=128, vocab=128_256
        ),
        replays=50,
        copy_bytes=4 * 2**30,
        matrix=8192,
        chain=1000,
        adapters=(1, 8, 32, 64),
        ranks=(("16", (16,)), ("64", (64,)), ("8-128", MIXED_RANKS)),
        rows=(1, 8, 32, 64, 128),
        contexts=(1024, 4096),
        decode_rows=(1, 8, 32, 64),
        lora_rows=32,
        lora_sets=(
            ("8 x r16", 8, (16,)),
            ("32 x r16", 32, (16,)),
            ("32 x r8-128", 32, MIXED_RANKS),
        ),
        steps=100,
        swaps=20,
        swap_rank=16,
        pool_bytes=24 * 2**30,
        parity_dtypes=(torch.float32, torch.bfloat16, torch.float16),
        tunings=Tunings(),
    )


def dry() -> Extent:
    """Every code path on the CPU; the figures mean nothing."""
    tiny = _config(hidden=32, ffn=32, layers=1, heads=2, kv_heads=1, dim=16, vocab=32)
    return Extent(
        device=torch.device("cpu"),
        dtype=torch.float32,
        small=tiny,
        large=tiny,
        replays=1,
        copy_bytes=2**16,
        matrix=64,
        chain=2,
        adapters=(2,),
        ranks=(("8", (8,)), ("8-16", (8, 16))),
        rows=(2,),
        contexts=(20,),
        decode_rows=(1, 2),
        lora_rows=2,
        lora_sets=(("2 x r8", 2, (8,)),),
        steps=2,
        swaps=1,
        swap_rank=8,
        pool_bytes=2**20,
        parity_dtypes=(torch.float32,),
        # Programs run one after the other here, those without work, too.
        tunings=Tunings(replace(DECODE_TUNING, shrink_programs=2, expand_programs=2, splits=2)),
    )


def _config(
    *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, dim: int, vocab: int
) -> ModelConfig:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }
    return parse_config(_LLAMA | shape, {})
