"""Compiles the engine's kernels for GPUs that are not there, at the shapes of real models.

Prints a JSON object: by kernel and compute capability, what each takes of the device. A process of
its own, because Triton either compiles or interprets.

    PYTHONPATH=.:gen python -m tests.engine.triton_aot [--all]
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from services.worker.engine.triton_attention import (
    AttentionTuning,
    attention_tuning,
    decode_constants,
    prefill_constants,
    reduce_constants,
)
from services.worker.engine.triton_attention_kernels import (
    decode_kernel,
    prefill_kernel,
    reduce_kernel,
)
from services.worker.engine.triton_ops import (
    CacheShape,
    GroupLora,
    HeadRules,
    add_norm_constants,
    finish_warps,
    gate_up_constants,
    qkv_constants,
)
from services.worker.engine.triton_ops_kernels import (
    add_norm_kernel,
    finish_gate_up_kernel,
    finish_qkv_kernel,
)
from services.worker.engine.triton_support import KernelCase, compile_ahead
from services.worker.lora.triton_lora import (
    DECODE_TUNING,
    PREFILL_TUNING,
    LinearGroup,
    LoraStep,
    LoraTuning,
    expand_constants,
    shrink_constants,
)
from services.worker.lora.triton_lora_kernels import expand_kernel, shrink_kernel
from services.worker.lora.worklist import WorkShape

CAPABILITIES = (80, 90, 100)
Arguments = Mapping[str, torch.dtype | str]


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    has_qk_norm: bool = False

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.layers, self.kv_heads, 16, self.head_dim)

    def groups(self) -> dict[str, LinearGroup]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": LinearGroup(0, self.hidden, (q, kv, kv)),
            "o": LinearGroup(3, q, (self.hidden,)),
            "gate_up": LinearGroup(4, self.hidden, (self.ffn, self.ffn)),
            "down": LinearGroup(6, self.ffn, (self.hidden,)),
        }


LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128)
LLAMA_1B = Model("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64)
SMOLLM2 = Model("SmolLM2-135M", 30, 576, 1536, 9, 3, 64)
OTHERS = (
    Model("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, has_qk_norm=True),
    Model("Llama-2-7B", 32, 4096, 11008, 32, 32, 128),
    Model("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64),
    Model("heads of 32", 4, 256, 512, 8, 4, 32),
    Model("heads of 80", 4, 1280, 2560, 16, 4, 80),
    Model("heads of 96", 4, 3072, 8192, 32, 32, 96),
    Model("heads of 256", 4, 2048, 8192, 8, 1, 256),
)


def cases(model: Model, capability: int) -> Iterator[KernelCase]:
    """Every kernel as the engine starts it for this model in bf16."""
    dtype = torch.bfloat16
    for tuning in (DECODE_TUNING, PREFILL_TUNING):
        for name, group in model.groups().items():
            yield _shrink_case(f"{model.name} shrink {name}", group, tuning, dtype)
            yield _expand_case(f"{model.name} expand {name}", group, tuning, dtype)
    for lora in (None, _lora(model, DECODE_TUNING), _lora(model, PREFILL_TUNING)):
        yield _finish_qkv_case(model, lora, dtype)
        yield _finish_gate_up_case(model, lora, dtype)
    yield from _attention_cases(model, attention_tuning(capability, model.head_dim), dtype)
    yield _norm_case(model, dtype)


def _shrink_case(
    name: str, group: LinearGroup, tuning: LoraTuning, dtype: torch.dtype
) -> KernelCase:
    return KernelCase(
        f"{name} {tuning.tile_rows}",
        shrink_kernel,
        {**_lora_arguments(dtype), "x_ptr": dtype, "x_stride": "i32:16", "items_at": "i32"},
        shrink_constants(group, tuning),
        tuning.shrink_warps,
        tuning.shrink_stages,
    )


def _expand_case(
    name: str, group: LinearGroup, tuning: LoraTuning, dtype: torch.dtype
) -> KernelCase:
    return KernelCase(
        f"{name} {tuning.tile_rows}",
        expand_kernel,
        {**_lora_arguments(dtype), "y_ptr": dtype, "y_stride": "i32:16", "tiles_at": "i32"},
        expand_constants(group, tuning),
        tuning.expand_warps,
        tuning.expand_stages,
    )


def _lora_arguments(dtype: torch.dtype) -> Arguments:
    return {
        "pool_ptr": dtype,
        "tables_ptr": torch.int64,
        "work_ptr": torch.int32,
        "planes_ptr": torch.float32,
        "plane_elements": "i32",
        "place": "i32",
    }


def _lora(model: Model, tuning: LoraTuning) -> GroupLora:
    empty = torch.empty(0)
    step = LoraStep(empty, empty, empty, empty, WorkShape(1, 1, 1), tuning)
    return GroupLora(step, model.groups()["qkv"], 0)


def _name(model: Model, kernel: str, lora: GroupLora | None) -> str:
    return f"{model.name} {kernel}" + (f" {lora.step.tuning.tile_rows}" if lora else "")


def _finish_qkv_case(model: Model, lora: GroupLora | None, dtype: torch.dtype) -> KernelCase:
    table = torch.empty(0)
    rules = HeadRules(table if model.has_qk_norm else None, 1e-5, table, table)
    arguments: Arguments = {
        **_lora_arguments(dtype),
        "qkv_ptr": dtype,
        "positions_ptr": torch.int32,
        "slots_ptr": torch.int32,
        "norms_ptr": torch.float32,
        "cos_ptr": torch.float32,
        "sin_ptr": torch.float32,
        "rows": "i32",
        "tiles_at": "i32",
        "qkv_stride": "i32:16",
        "eps": "fp32",
        "layer_at": "i32:16",
    }
    constants = qkv_constants(model.heads, model.cache, rules, lora)
    name = _name(model, "finish_qkv", lora)
    return KernelCase(name, finish_qkv_kernel, arguments, constants, finish_warps(lora), 2)


def _finish_gate_up_case(model: Model, lora: GroupLora | None, dtype: torch.dtype) -> KernelCase:
    arguments: Arguments = {
        **_lora_arguments(dtype),
        "gate_up_ptr": dtype,
        "out_ptr": dtype,
        "rows": "i32",
        "tiles_at": "i32",
        "gate_up_stride": "i32:16",
        "out_stride": "i32:16",
    }
    constants = gate_up_constants(model.ffn, lora)
    name = _name(model, "finish_gate_up", lora)
    return KernelCase(name, finish_gate_up_kernel, arguments, constants, finish_warps(lora), 2)


def _norm_case(model: Model, dtype: torch.dtype) -> KernelCase:
    arguments: Arguments = {
        "hidden_ptr": torch.float32,
        "added_ptr": dtype,
        "weight_ptr": torch.float32,
        "out_ptr": dtype,
        "hidden_stride": "i32:16",
        "added_stride": "i32:16",
        "out_stride": "i32:16",
        "eps": "fp32",
    }
    constants = add_norm_constants(model.hidden, has_added=True)
    warps = int(constants.pop("num_warps"))
    return KernelCase(f"{model.name} add_norm", add_norm_kernel, arguments, constants, warps, 2)


def _attention_cases(
    model: Model, tuning: AttentionTuning, dtype: torch.dtype
) -> Iterator[KernelCase]:
    common: Arguments = {
        "q_ptr": dtype,
        "pool_ptr": dtype,
        "blocks_ptr": torch.int32,
        "scale": "fp32",
        "q_stride": "i32:16",
        "blocks_stride": "i32",
        "layer_at": "i32:16",
        "out_ptr": dtype,
        "out_stride": "i32:16",
        "lengths_ptr": torch.int32,
    }
    parts: Arguments = {"outputs_ptr": torch.float32, "weights_ptr": torch.float32}
    yield KernelCase(
        f"{model.name} decode_attention",
        decode_kernel,
        {**common, **parts},
        decode_constants(model.heads, model.cache, tuning),
        tuning.decode_warps,
        tuning.decode_stages,
    )
    yield KernelCase(
        f"{model.name} reduce_attention",
        reduce_kernel,
        {**common, **parts},
        reduce_constants(model.heads, model.cache, tuning),
        2,
        1,
    )
    yield KernelCase(
        f"{model.name} prefill_attention",
        prefill_kernel,
        {**common, "segments_ptr": torch.int32, "tiles_ptr": torch.int32},
        prefill_constants(model.heads, model.cache, tuning),
        tuning.prefill_warps,
        tuning.prefill_stages,
    )


def selected(*, every: bool) -> Iterator[tuple[KernelCase, int]]:
    """Cases with a capability each; without `every`, those that cover all kernels and devices."""
    for model in (LLAMA_8B, LLAMA_1B, SMOLLM2, *OTHERS):
        for capability in CAPABILITIES:
            for case in cases(model, capability):
                if every or _is_typical(case, model, capability):
                    yield case, capability


def _is_typical(case: KernelCase, model: Model, capability: int) -> bool:
    if model is LLAMA_8B and capability == 90:
        return not case.name.endswith(_SIMILAR)
    is_seen = model is LLAMA_8B or (model in {LLAMA_1B, SMOLLM2} and capability == 90)
    return is_seen and case.name.endswith(_EVERYWHERE)


# Of the linears of a large model, those that compile to what another one does.
_SIMILAR = tuple(
    f"{kernel} {group} {rows}"
    for kernel in ("shrink", "expand")
    for group in ("o", "down", "gate_up")
    for rows in (16, 64)
)
_EVERYWHERE = (
    "shrink qkv 16",
    "expand qkv 16",
    "finish_qkv 16",
    "decode_attention",
    "prefill_attention",
)


def main() -> None:
    report = {}
    for case, capability in selected(every="--all" in sys.argv):
        found = compile_ahead(case, capability)
        report[f"{case.name} sm_{capability}"] = {**asdict(found), "capability": capability}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
