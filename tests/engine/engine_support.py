"""What the engine's tests share: tiny models on disk, and a caller as the worker would be one."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
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

from services.common.adapter_container import ContainerHeader
from services.worker.engine import (
    EngineInfo,
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    build_engine,
)
from services.worker.engine.runner import ModelEngine
from tests.engine.tiny_families import LINEAR_ROPE, LLAMA3_ROPE, SHAPE

SHARED = Path(
    os.environ.get("CALUMMA_SHARED") or Path(__file__).resolve().parents[2].parent / "shared"
)
DType = Literal["bfloat16", "float16", "float32"]
Device = Literal["cpu", "cuda"]
GREEDY = Sampling()
VOCAB: int = SHAPE["vocab_size"]
_SHAPE: dict[str, Any] = SHAPE | {"num_hidden_layers": 3, "head_dim": 32}
TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama 3 rope": LlamaConfig(**_SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "linear rope": LlamaConfig(**_SHAPE, rope_parameters=LINEAR_ROPE),
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


class OwnedEngine:
    """An engine with the owner of its blocks: an `Engine` whose steps need not say which are new.

    Blocks are given away in random order, so that no context is in one piece.
    """

    def __init__(self, engine: ModelEngine, *, seed: int = 0) -> None:
        self.engine = engine
        self._free = list(range(engine.info.pool_blocks))
        self._random = random.Random(seed)
        self._random.shuffle(self._free)
        self._held: dict[str, list[int]] = {}
        self._shared: dict[str, tuple[int, ...]] = {}
        self._tokens: dict[str, int] = {}

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_of(self, sequence_id: str) -> tuple[int, ...]:
        return (*self._shared[sequence_id], *self._held[sequence_id])

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        assert not blocks
        count = -(-header.payload_bytes // self.info.block_bytes)
        own = tuple(self._take() for _ in range(count))
        self._held[_adapter(digest)] = list(own)
        try:
            self.engine.begin_adapter(digest, header, payload, blocks=own)
        except BaseException:
            self._give_back(_adapter(digest))
            raise

    def extend_adapter(self, digest: str, layers: int) -> None:
        self.engine.extend_adapter(digest, layers)

    def remove_adapter(self, digest: str) -> None:
        self.engine.remove_adapter(digest)
        self._give_back(_adapter(digest))

    def open_sequence(self, spec: SequenceSpec) -> None:
        self.engine.open_sequence(spec)
        self._held[spec.sequence_id] = []
        self._shared[spec.sequence_id] = spec.blocks
        self._tokens[spec.sequence_id] = spec.computed_tokens

    def close_sequence(self, sequence_id: str) -> None:
        self.engine.close_sequence(sequence_id)
        self._give_back(sequence_id)

    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        results = self.engine.step([self._with_blocks(item) for item in items])
        for item in items:
            if item.until_layer is None:
                self._tokens[item.sequence_id] += item.num_tokens
        return results

    def check_integrity(self) -> None:
        self.engine.check_integrity()
        held = [block for blocks in self._held.values() for block in blocks]
        assert sorted([*held, *self._free]) == list(range(self.info.pool_blocks))

    def _with_blocks(self, item: StepItem) -> StepItem:
        end = self._tokens[item.sequence_id] + item.num_tokens
        count = -(-end // self.info.block_tokens) - len(self.blocks_of(item.sequence_id))
        new_blocks = tuple(self._take() for _ in range(count))
        self._held[item.sequence_id].extend(new_blocks)
        return replace(item, new_blocks=new_blocks)

    def _take(self) -> int:
        return self._free.pop()

    def _give_back(self, holder: str) -> None:
        for block in self._held.pop(holder, []):
            self._free.insert(self._random.randrange(len(self._free) + 1), block)


def _adapter(digest: str) -> str:
    """Holds blocks under a name that no sequence has."""
    return f"adapter {digest}"


def model_engine(
    folder: Path, *, dtype: DType = "float32", device: Device = "cpu", **settings: int
) -> OwnedEngine:
    engine = build_engine(
        EngineSettings(model=folder, dtype=dtype, device=device, **settings)  # type: ignore[arg-type]
    )
    assert isinstance(engine, ModelEngine)
    return OwnedEngine(engine)


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
    engine: OwnedEngine, specs: Sequence[SequenceSpec], *, chunk: int = 1000, stagger: int = 0
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
            uncomputed[arrival.sequence_id] = len(arrival.token_ids) - arrival.computed_tokens
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
    engine: OwnedEngine, specs: Sequence[SequenceSpec], **options: int
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
