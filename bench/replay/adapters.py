"""Adapters to publish: PEFT folders of the default base model's shape, made of constants.

The simulated engine reads an adapter's rank and is charged its bytes; its weights say nothing.
"""

import json
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

_LAYERS: Final = 30
_HIDDEN: Final = 576
_OUT_FEATURES: Final = {"q_proj": 576, "v_proj": 192}


def write_adapters(folder: Path, ranks: list[int]) -> list[str]:
    """One adapter per rank; their names, in order."""
    names = [f"replay-{index:03}" for index in range(len(ranks))]
    for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        _write(folder / name, rank, mark=index + 1)
    return names


def _write(folder: Path, rank: int, *, mark: int) -> None:
    """`mark` makes its bytes, and so its digest, differ from the others'."""
    folder.mkdir(parents=True)
    tensors: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float16]]] = {}
    for layer in range(_LAYERS):
        for module, out_features in _OUT_FEATURES.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{path}.lora_A.weight"] = np.ones((rank, _HIDDEN), np.float16)
            tensors[f"{path}.lora_B.weight"] = np.full((out_features, rank), mark, np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(_OUT_FEATURES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
