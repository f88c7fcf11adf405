"""A tiny model with adapters made by PEFT, and what PEFT computes with each: the truth of tests.

The blobs are the store's own conversion of what PEFT saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.adapter_store.peft import BaseModel, convert
from services.common.base_model import load_config
from services.worker.engine import add_adapter
from tests.engine.engine_support import VOCAB, OwnedEngine, reference_greedy, tiny_model

RANK_MAX: Final = 256


def prompt(index: int, length: int = 12) -> list[int]:
    """Random tokens, the same for the same index."""
    generator = torch.Generator().manual_seed(100 + index)
    token_ids: list[int] = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return token_ids


@dataclass(frozen=True, slots=True)
class PeftWorld:
    """`blobs`: digest and bytes of each adapter, by its name."""

    folder: Path
    model: Any
    blobs: Mapping[str, tuple[str, bytearray]]

    def digest(self, name: str | None) -> str | None:
        return None if name is None else self.blobs[name][0]

    def add_all(self, engine: OwnedEngine) -> None:
        for digest, blob in self.blobs.values():
            add_adapter(engine, digest, blob)

    def greedy(self, name: str | None, token_ids: Sequence[int], tokens: int = 24) -> list[int]:
        """What PEFT generates; None is the base model."""
        if name is None:
            with self.model.disable_adapter():
                return reference_greedy(self.model, token_ids, tokens)
        self.model.set_adapter(name)
        return reference_greedy(self.model, token_ids, tokens)

    def logprobs(self, name: str | None, token_ids: Sequence[int]) -> Tensor:
        """PEFT's distribution of the token after these, `[vocab]`."""
        if name is None:
            with self.model.disable_adapter():
                return self._logprobs(token_ids)
        self.model.set_adapter(name)
        return self._logprobs(token_ids)

    @torch.inference_mode()
    def _logprobs(self, token_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self.model(input_ids=torch.tensor([list(token_ids)])).logits[0, -1]
        return logits.log_softmax(-1)


def peft_world(
    folder: Path,
    adapters: Mapping[str, LoraConfig],
    *,
    base: str = "llama",
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> PeftWorld:
    """Random adapters on a random model. `dtypes`: of those that are not saved in fp32."""
    model: Any = tiny_model(folder / "model", base)
    names = list(adapters)
    model = get_peft_model(model, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, adapters[name])
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=_std(key))
                parameter.copy_(parameter.to(_dtype_of(key, dtypes or {})).float())
    model.save_pretrained(folder / "peft", selected_adapters=names, save_embedding_layers=False)
    for name, dtype in (dtypes or {}).items():
        _cast(folder / "peft" / name / "adapter_model.safetensors", dtype)
    config = BaseModel(load_config(folder / "model"), ())
    blobs = {name: _converted(folder / "peft" / name, config) for name in names}
    return PeftWorld(folder / "model", model, blobs)


def _std(key: str) -> float:
    """So that each kind of module changes the output, and none drowns the others."""
    return 0.1 if "lm_head" in key else 0.3


def _dtype_of(key: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    parts = key.split(".")
    return next((dtype for name, dtype in dtypes.items() if name in parts), torch.float32)


def _cast(path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)


def _converted(folder: Path, base: BaseModel) -> tuple[str, bytearray]:
    config = (folder / "adapter_config.json").read_bytes()
    data = memoryview((folder / "adapter_model.safetensors").read_bytes())
    converted = convert(config, data, base, rank_max=RANK_MAX)
    return converted.weights.digest, bytearray(converted.blob)
