"""An engine without a model: it takes the time of real hardware and makes up the tokens.

For trying the whole suite on a machine without a GPU, and for load tests of everything but the
model. The same seed and the same requests give the same tokens, whatever their batch mates: a token
is a hash of its sequence's seed and position. A sequence ends with the model's end-of-sequence
token after a length drawn from its seed, log-normal with the median and 90th percentile of the
Azure LLM inference trace of conversations (CC-BY 4.0). A request that suppresses that token up to
`min_tokens` does not get it earlier.

There is nothing in its blocks, but it asserts of them what an engine with memory relies on.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final

from services.common.adapter_container import ContainerHeader
from services.common.base_model import load_config, model_identity
from services.worker.engine.api import (
    EngineInfo,
    EngineSettings,
    SampledToken,
    SequenceFailure,
    SequenceSpec,
    StepItem,
)
from services.worker.engine.profiles import PROFILES, HardwareProfile, PartLoad, StepLoad
from services.worker.engine.randomness import hash64, uniform

_OUTPUT_TOKENS_P50: Final = 129
_OUTPUT_TOKENS_P90: Final = 424
_LOG_OUTPUT_TOKENS = NormalDist(
    mu=math.log(_OUTPUT_TOKENS_P50),
    sigma=math.log(_OUTPUT_TOKENS_P90 / _OUTPUT_TOKENS_P50) / NormalDist().inv_cdf(0.9),
)
_LENGTH_COUNTER = 2**40  # apart from all positions
_FIRST_TEXT_TOKEN = 32  # lower ids are control tokens in the usual vocabularies


@dataclass(slots=True)
class _Adapter:
    rank: int
    size_bytes: int
    blocks: tuple[int, ...]
    ready_layers: int = 0


@dataclass(slots=True)
class _Sequence:
    spec: SequenceSpec
    seed: int
    known: int  # tokens, prompt included
    computed: int
    rank: int  # 0 for the base model
    passed_layers: int = 0  # by the chunk that comes next
    blocks: list[int] = field(default_factory=list[int])


class SimulatedEngine:
    """See `Engine`. `sleep` takes seconds; who runs in virtual time passes both it and `clock`.

    What this process takes to make the tokens is part of the step's time, not on top of it.
    A part of an adapter takes its share of the transfer on the thread that brings it, beside steps.
    """

    def __init__(
        self,
        info: EngineInfo,
        profile: HardwareProfile,
        *,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info = info
        self._profile = profile
        self._seed = seed
        self._sleep = sleep
        self._clock = clock
        self._adapters: dict[str, _Adapter] = {}
        self._sequences: dict[str, _Sequence] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        assert digest not in self._adapters
        assert len(payload) == header.payload_bytes
        self._adapters[digest] = _Adapter(header.rank, header.total_bytes, blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        adapter = self._adapters[digest]
        assert adapter.ready_layers < layers <= self._info.num_layers
        share = (layers - adapter.ready_layers) / self._info.num_layers
        self._sleep(self._profile.load_s(adapter.size_bytes) * share)
        adapter.ready_layers = layers

    def remove_adapter(self, digest: str) -> None:
        assert all(item.spec.adapter_digest != digest for item in self._sequences.values())
        del self._adapters[digest]

    def open_sequence(self, spec: SequenceSpec) -> None:
        assert spec.sequence_id not in self._sequences
        assert len(self._sequences) < self._info.max_sequences
        assert 0 < len(spec.token_ids) <= self._info.max_context_tokens
        rank = 0 if spec.adapter_digest is None else self._adapters[spec.adapter_digest].rank
        seed = sequence_seed(self._seed, spec.sampling.seed)
        assert spec.computed_tokens == len(spec.blocks) * self._info.block_tokens
        assert spec.computed_tokens < len(spec.token_ids)
        self._sequences[spec.sequence_id] = _Sequence(
            spec, seed, len(spec.token_ids), spec.computed_tokens, rank, blocks=list(spec.blocks)
        )

    def close_sequence(self, sequence_id: str) -> None:
        self._sequences.pop(sequence_id, None)

    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        start_s = self._clock()
        chunks = [(self._sequences[item.sequence_id], item) for item in items]
        for sequence, item in chunks:
            sequence.blocks.extend(item.new_blocks)
            room_tokens = len(sequence.blocks) * self._info.block_tokens
            assert sequence.computed + item.num_tokens <= room_tokens
        end_s = start_s + self._step_s(chunks)
        results: list[SampledToken | SequenceFailure] = []
        for sequence, item in chunks:
            if item.until_layer is not None:
                sequence.passed_layers = item.until_layer
                continue
            sequence.passed_layers = 0
            sequence.computed += item.num_tokens
            assert sequence.computed <= min(sequence.known, self._info.max_context_tokens)
            if sequence.computed == sequence.known:
                results.append(self._draw(sequence))
                sequence.known += 1
        self._sleep(max(0.0, end_s - self._clock()))
        return results

    def check_integrity(self) -> None:
        """Assert that what a sequence or a load may still write to has one holder."""
        holders = Counter(block for one in self._adapters.values() for block in one.blocks)
        for sequence in self._sequences.values():
            holders.update(sequence.blocks)
        assert all(0 <= block < self._info.pool_blocks for block in holders)
        own = [block for one in self._adapters.values() for block in one.blocks]
        for sequence in self._sequences.values():
            own += sequence.blocks[sequence.computed // self._info.block_tokens :]
        assert all(holders[block] == 1 for block in own)

    def _step_s(self, chunks: Sequence[tuple[_Sequence, StepItem]]) -> float:
        num_layers = self._info.num_layers
        whole: list[tuple[_Sequence, int]] = []
        parts: list[PartLoad] = []
        for sequence, item in chunks:
            end = num_layers if item.until_layer is None else item.until_layer
            assert sequence.passed_layers <= end <= self._ready_layers(sequence)
            layers = end - sequence.passed_layers
            if layers == num_layers:
                whole.append((sequence, item.num_tokens))
            else:
                parts.append(PartLoad(item.num_tokens, sequence.rank, layers / num_layers))
        return self._profile.step_s(_load_of(whole) if whole else None, parts)

    def _ready_layers(self, sequence: _Sequence) -> int:
        digest = sequence.spec.adapter_digest
        return self._info.num_layers if digest is None else self._adapters[digest].ready_layers

    def _draw(self, sequence: _Sequence) -> SampledToken:
        spec = sequence.spec
        token_id = self._token_id(sequence)
        if spec.sampling.logprobs is None:
            return SampledToken(spec.sequence_id, token_id, None, ())
        # The made-up distribution is certain of its token.
        top = ((token_id, 0.0),) if spec.sampling.logprobs else ()
        return SampledToken(spec.sequence_id, token_id, 0.0, top)

    def _token_id(self, sequence: _Sequence) -> int:
        sampling = sequence.spec.sampling
        position = sequence.known - sequence.spec.prompt_tokens
        for eos in self._info.eos_token_ids[:1]:
            is_suppressed = eos in sampling.suppressed_ids and position < sampling.min_tokens
            if not is_suppressed and position >= output_tokens(sequence.seed):
                return eos
        count = self._info.vocab_size - _FIRST_TEXT_TOKEN
        token_id = _FIRST_TEXT_TOKEN + hash64(sequence.seed, position) % count
        while token_id in self._info.eos_token_ids:
            token_id -= 1
        return token_id


def sequence_seed(engine_seed: int, sampling_seed: int) -> int:
    """The seed of a sequence; its length follows from it."""
    return hash64(engine_seed, sampling_seed)


def output_tokens(seed: int) -> int:
    """How many tokens a sequence with this seed produces before it ends: 1 and up."""
    number = max(uniform(seed, _LENGTH_COUNTER), 2.0**-53)
    return max(1, round(math.exp(_LOG_OUTPUT_TOKENS.inv_cdf(number))))


def build_simulated_engine(settings: EngineSettings) -> SimulatedEngine:
    """Raises BaseModelError for a bad model folder and ValueError for an unknown profile."""
    profile = PROFILES.get(settings.profile)
    if profile is None:
        raise ValueError(f"profile {settings.profile!r} is not among {', '.join(PROFILES)}")
    return SimulatedEngine(_describe(settings, profile), profile, seed=settings.seed)


def _describe(settings: EngineSettings, profile: HardwareProfile) -> EngineInfo:
    """A model folder gives name, vocabulary and control tokens; the profile gives the rest."""
    name, digest = profile.name, f"simulated:{profile.name}"
    vocab_size, eos_token_ids = profile.vocab_size, profile.eos_token_ids
    if settings.model is not None:
        config, identity = load_config(settings.model), model_identity(settings.model)
        name, digest = identity.name, identity.digest
        vocab_size, eos_token_ids = config.vocab_size, config.eos_token_ids
    block_bytes = settings.block_tokens * profile.kv_bytes_per_token
    return EngineInfo(
        description=f"simulated {profile.name}",
        model_name=name,
        model_digest=digest,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_sequences=settings.max_sequences,
        max_context_tokens=min(
            settings.max_context_tokens or profile.max_context_tokens, profile.max_context_tokens
        ),
        pool_blocks=(settings.memory_bytes or profile.memory_bytes) // block_bytes,
        block_tokens=settings.block_tokens,
        block_bytes=block_bytes,
        num_layers=profile.num_layers,
    )


def _load_of(chunks: Sequence[tuple[_Sequence, int]]) -> StepLoad:
    decode = [item for item, num_tokens in chunks if num_tokens == 1]
    prefill = [(item, num_tokens) for item, num_tokens in chunks if num_tokens > 1]
    return StepLoad(
        prefill_tokens=sum(num_tokens for _, num_tokens in prefill),
        prefill_rank_tokens=sum(item.rank * num_tokens for item, num_tokens in prefill),
        decode_sequences=len(decode),
        decode_ranks=sum(item.rank for item in decode),
        cached_tokens=sum(item.computed for item, _ in chunks),
        has_adapters=any(item.rank for item, _ in chunks),
    )
