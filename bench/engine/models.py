"""The models and adapters that engines are compared on, made once in the cache home.

"small" is a Llama with random weights (56 million parameters), with adapters of ranks 8, 16, 32 and
64 on all its linears; "smol" is SmolLM2-135M with adapters of rank 16. Adapters are random, too,
and large enough to change what is generated. A folder appears complete or not at all.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.peers.gguf_model import write_gguf
from services.common.base_model import (
    DEFAULT_MODEL,
    ModelConfig,
    cache_home,
    linear_shapes,
    load_config,
    locate,
    weight_files,
)

SMALL_RANKS: Final = (8, 16, 32, 64)
SMALL_ADAPTERS: Final = 16
SMOL_RANK: Final = 16
SMOL_ADAPTERS: Final = 8
_VERSION: Final = "1"  # of what is made here: another one makes it anew
_ADAPTER_STD: Final = 0.05
_BF16_BYTES: Final = 2
_SPECIALS: Final = ("<unk>", "<s>", "</s>")
_SMALL: Final[dict[str, Any]] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its adapters. `gguf` is the same model for llama.cpp."""

    name: str
    folder: Path
    gguf: Path
    adapters: Sequence[Path]
    ranks: Sequence[int]

    @property
    def config(self) -> ModelConfig:
        return load_config(self.folder)

    @property
    def read_bytes(self) -> int:
        """Weights that a decode step reads: all but an embedding of its own, of which it reads
        one row per request.
        """
        config = self.config
        total = sum(file.stat().st_size for file in weight_files(self.folder))
        embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
        return total - embedding * _BF16_BYTES

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens, in bf16."""
        config = self.config
        return tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * _BF16_BYTES

    def adapter_bytes(self, index: int) -> int:
        """Weights of one adapter in bf16."""
        width = sum(sum(shape) for shape in linear_shapes(self.config).values())
        return self.ranks[index] * width * self.config.num_layers * _BF16_BYTES


def small() -> Subject:
    """The random Llama, 80 MB of which are read in a decode step."""
    ranks = [SMALL_RANKS[index % len(SMALL_RANKS)] for index in range(SMALL_ADAPTERS)]
    folder = _made(f"small-{_VERSION}", _make_small)
    return _subject("small", folder, ranks)


def smol() -> Subject:
    """SmolLM2-135M, 269 MB in a decode step. Raises ModelNotFoundError when it was not pulled."""
    return _subject("smol", locate(DEFAULT_MODEL), [SMOL_RANK] * SMOL_ADAPTERS)


def _subject(name: str, folder: Path, ranks: Sequence[int]) -> Subject:
    config = load_config(folder)

    def make_adapters(target: Path) -> None:
        for index, rank in enumerate(ranks):
            _write_adapter(target / f"adapter-{index:02}", config, rank=rank, seed=index)

    def make_gguf(target: Path) -> None:
        write_gguf(folder, target / "model.gguf")

    adapters = _made(f"{name}-adapters-{_VERSION}", make_adapters)
    gguf = _made(f"{name}-gguf-{_VERSION}", make_gguf) / "model.gguf"
    return Subject(name, folder, gguf, sorted(adapters.iterdir()), ranks)


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, filled by `make` unless it is there."""
    folder = cache_home() / "bench" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        make(scratch)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _make_small(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SMALL)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One word per token, so that the model can be served as text, too."""
    words = [*_SPECIALS, *(f"w{index}" for index in range(len(_SPECIALS), _SMALL["vocab_size"]))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, word in enumerate(_SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(words)},
            "unk_token": _SPECIALS[0],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"bos_token": _SPECIALS[1], "eos_token": _SPECIALS[2], "unk_token": _SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _write_adapter(folder: Path, config: ModelConfig, *, rank: int, seed: int) -> None:
    """A PEFT folder with random weights in every linear, of a scale of 1."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_layers):
        for module, (inputs, outputs) in linear_shapes(config).items():
            block = "self_attn" if module in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=generator) * _ADAPTER_STD
                tensors[f"{name}.lora_{side}.weight"] = values.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(linear_shapes(config)),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
