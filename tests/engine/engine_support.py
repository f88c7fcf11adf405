"""What the engine's tests share: tiny models on disk, and a caller as the worker would be one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from services.worker.engine import (
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    build_engine,
)
from services.worker.engine.runner import TorchEngine

SHARED = Path(
    os.environ.get("CALUMMA_SHARED") or Path(__file__).resolve().parents[2].parent / "shared"
)
DType = Literal["bfloat16", "float16", "float32"]
GREEDY = Sampling()
VOCAB = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE: Any = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR_ROPE: Any = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama 3 rope": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True),
    "linear rope": LlamaConfig(**_SHAPE, rope_parameters=_LINEAR_ROPE),
    "mistral": MistralConfig(**_SHAPE, sliding_window=None, tie_word_embeddings=False),
    "qwen 2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen 3": Qwen3Config(**_SHAPE, tie_word_embeddings=False),
}


def tiny_model(folder: Path, name: str = "llama", *, shard: str = "1GB") -> PreTrainedModel:
    """A random model, the same for the same name, saved to the folder. Biases and norms too."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS[name]).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def torch_engine(folder: Path, *, dtype: DType = "float32", **settings: int) -> TorchEngine:
    engine = build_engine(EngineSettings(model=folder, dtype=dtype, **settings))  # type: ignore[arg-type]
    assert isinstance(engine, TorchEngine)
    return engine


def spec(
    sequence_id: str,
    prompt: Sequence[int],
    *,
    emitted: Sequence[int] = (),
    adapter: str | None = None,
    sampling: Sampling = GREEDY,
    max_tokens: int = 24,
) -> SequenceSpec:
    tokens = (*prompt, *emitted)
    return SequenceSpec(sequence_id, tokens, len(prompt), adapter, sampling, max_tokens)


def generate(
    engine: TorchEngine, specs: Sequence[SequenceSpec], *, chunk: int = 1000, stagger: int = 0
) -> dict[str, list[SampledToken]]:
    """All output of all sequences, in mixed steps; `stagger`: steps between two arrivals."""
    outputs: dict[str, list[SampledToken]] = {}
    uncomputed: dict[str, int] = {}
    waiting = list(specs)
    step = 0
    while waiting or uncomputed:
        while waiting and step >= stagger * len(outputs):
            arrival = waiting.pop(0)
            engine.open_sequence(arrival)
            outputs[arrival.sequence_id] = []
            uncomputed[arrival.sequence_id] = len(arrival.token_ids)
        step += 1
        items = [StepItem(name, min(chunk, left)) for name, left in uncomputed.items()]
        results = engine.step(items)
        for item in items:
            uncomputed[item.sequence_id] -= item.num_tokens
        for result in results:
            assert not isinstance(result, SequenceFailure), result
            outputs[result.sequence_id].append(result)
            uncomputed[result.sequence_id] = 1
        for known in specs:
            name = known.sequence_id
            emitted = len(known.token_ids) - known.prompt_tokens
            if name in uncomputed and len(outputs[name]) + emitted == known.max_tokens:
                engine.close_sequence(name)
                del uncomputed[name]
    return outputs


def token_ids(output: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in output]


def generated(
    engine: TorchEngine, specs: Sequence[SequenceSpec], **options: int
) -> dict[str, list[int]]:
    outputs = generate(engine, specs, **options)
    return {name: token_ids(output) for name, output in outputs.items()}


def distribution(token: SampledToken) -> torch.Tensor:
    """Log-probabilities `[vocab]` of a token that was sampled with `logprobs=VOCAB`."""
    assert len(token.top) == VOCAB
    return torch.tensor([logprob for _, logprob in sorted(token.top)])


def reference_greedy(model: Any, prompt: Sequence[int], tokens: int = 24) -> list[int]:
    """What transformers (and PEFT) generates, without ending at the end-of-sequence token."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    token_ids: list[int] = output[0, len(prompt) :].tolist()
    return token_ids
