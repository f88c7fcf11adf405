"""Which tokens one step computes.

Three disciplines, `ReplicaConfig.stepping`:

- "target", the default. Every decoding request gets its token; then prompts, oldest first, get as
  many tokens as keep the step's predicted time within `tbt_target_s`. The promise to a client is
  about its mean time between tokens, so a step may be longer by `slack_share` of the time that the
  tightest decoding request is ahead of the target; longer, up to `step_limit_s`, the longer the
  first prompt has waited beyond `patience_s`, because its client waits for a first token; and as
  long as `step_limit_s` while nothing decodes. At least `min_prefill_tokens` are computed, so
  prompts end even where decodes alone take all the time. A step is predicted by costs fitted to
  the steps so far (`services.core.costfit`); a chunk reads the part of its prompt that is cached.
- "chunked". The same with a fixed number of prompt tokens, as in Sarathi-Serve.
- "whole", S-LoRA's. Prompts are computed whole, in a step of their own, while decodes wait; all
  that were admitted together go together.

A prompt whose adapter is still coming goes on as far as the adapter's layers are here, but under
"whole" (`services.core.layerwise`).

Memory: a decode may preempt younger requests, a prompt may not: its chunk shrinks to the blocks
there are. A prompt is short of blocks only while decodes hold more than they were promised; these
go on, so a step is never empty while something could run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from services.core.admission import is_lockstep
from services.core.config import ReplicaConfig
from services.core.costs import StepCosts, StepShape
from services.core.decisions import (
    EvictAdapter,
    PreemptRequest,
    ReplicaDecision,
    RunStep,
    StartRequest,
    StepWork,
)
from services.core.layerwise import LayerWise
from services.core.memory import SPARE_NONE, DeviceMemory
from services.core.roster import Roster
from services.core.sequence import Sequence
from services.core.types import AdapterDigest, RequestId

Chunk = tuple[Sequence, StepWork]


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    decodes: list[Sequence]
    chunks: list[Chunk]
    shape: StepShape
    began_s: float
    is_whole: bool  # something in it passes all layers: its time can be learned from

    def has(self, sequence: Sequence) -> bool:
        """True if it computes something of the sequence."""
        return sequence in self.decodes or any(one is sequence for one, _ in self.chunks)

    def uses(self, digest: AdapterDigest) -> bool:
        """True if it computes something with layers of an adapter that is still coming."""
        return any(
            work.until_layer is not None and one.digest == digest for one, work in self.chunks
        )

    def due(self) -> Iterator[tuple[Sequence, bool]]:
        """Its sequences, and whether it samples a token of each."""
        for sequence in self.decodes:
            yield sequence, True
        for sequence, work in self.chunks:
            yield sequence, work.samples


class Batching:
    """Forms the steps of one worker."""

    def __init__(self, config: ReplicaConfig, memory: DeviceMemory, roster: Roster) -> None:
        self._config = config
        self._memory = memory
        self._roster = roster
        self._is_lockstep = is_lockstep(config)
        self._layers = LayerWise(
            memory.capacity.num_layers,
            min_share=config.overlap_min_share,
            roster=roster,
            cache=memory.cache,
        )
        self._run = RunStep(())  # the last one of decodes only: most are the same again
        self._grown: list[Sequence] = []  # that got blocks for the step being formed
        self._out: list[ReplicaDecision] = []

    def form(self, costs: StepCosts, *, now: float) -> tuple[list[ReplicaDecision], Step | None]:
        """The next step, if there is anything to run now, and what must be done for it."""
        self._out, self._grown = [], []
        step = None if self._must_wait() else self._form(costs, now)
        if step is not None:
            self._out.append(self._run_step(step))
        return self._out, step

    @property
    def next_s(self) -> float | None:
        """When a step could be formed, though nothing happens before."""
        return self._layers.next_s if self._roster.early else None

    def _form(self, costs: StepCosts, now: float) -> Step | None:
        decodes: list[Sequence] = []
        chunks: list[Chunk] = []
        match self._config.stepping:
            case "whole":
                chunks = self._whole_prompts(now)
                decodes = [] if chunks else self._decodes(now)
            case "chunked":
                decodes = self._decodes(now)
                chunks = self._chunks(decodes, costs, now)
            case "target":
                decodes = self._decodes(now)
                chunks = self._target_chunks(decodes, costs, now)
            case _:
                assert_never(self._config.stepping)
        if not decodes and not chunks:
            return None
        is_whole = bool(decodes) or any(self._layers.share(*chunk) == 1.0 for chunk in chunks)
        return Step(decodes, chunks, self._shape(decodes, chunks), now, is_whole)

    def _run_step(self, step: Step) -> RunStep:
        roster = self._roster
        if len(step.decodes) == len(roster.decoding):
            work = roster.decodes()
        else:
            work = tuple(sequence.decode for sequence in step.decodes)
        if not step.chunks and work is self._run.work:
            return RunStep(work, self._new_blocks()) if self._grown else self._run
        starting = [*step.decodes, *(sequence for sequence, _ in step.chunks)]
        for sequence in starting:
            if not sequence.is_started:
                self._out.append(self._start(sequence))
        if step.chunks:
            work = (*work, *(chunk for _, chunk in step.chunks))
            return RunStep(work, self._new_blocks())
        self._run = RunStep(work)
        return RunStep(work, self._new_blocks()) if self._grown else self._run

    def _start(self, sequence: Sequence) -> StartRequest:
        sequence.is_started = True
        shared = tuple(sequence.blocks[: len(sequence.cached)])
        hit_tokens = sequence.computed_tokens
        self._memory.prefixes.note_start(
            context_tokens=sequence.known_tokens, hit_tokens=hit_tokens
        )
        return StartRequest(sequence.attempt, shared, hit_tokens)

    def _new_blocks(self) -> tuple[tuple[RequestId, tuple[int, ...]], ...]:
        """What the engine does not know yet. Who grew and was preempted after has nothing new."""
        new: list[tuple[RequestId, tuple[int, ...]]] = []
        for sequence in self._grown:
            blocks = sequence.blocks
            if sequence.told_blocks < len(blocks):
                new.append((sequence.request_id, tuple(blocks[sequence.told_blocks :])))
                sequence.told_blocks = len(blocks)
        return tuple(new)

    def _shape(self, decodes: list[Sequence], chunks: list[Chunk]) -> StepShape:
        """Parts count with their share of the layers."""
        ranks: float = self._roster.decode_ranks
        if len(decodes) != len(self._roster.decoding):
            ranks = sum([sequence.rank for sequence in decodes])
        cached_tokens = sum([sequence.computed_tokens for sequence in decodes])
        prefill_tokens = rank_tokens = 0.0
        sequences: float = len(decodes)
        for sequence, work in chunks:
            share = self._layers.share(sequence, work)
            if sequence.uncomputed_tokens == 1:  # a decode but for its adapter
                sequences += share
                ranks += share * sequence.rank
                continue
            prefill_tokens += share * work.tokens
            rank_tokens += share * work.tokens * sequence.rank
            cached_tokens += sequence.computed_tokens
        return StepShape(prefill_tokens, rank_tokens, sequences, ranks, cached_tokens)

    def _must_wait(self) -> bool:
        """True while S-LoRA's worker does nothing else: its memory counts on this order.

        It brings the adapters of a new batch before it goes on; and what it loads ahead holds
        blocks that nobody counted, which decodes may need before that load has ended.
        """
        if self._is_lockstep and self._roster.is_awaiting_loads:
            return True
        if not self._memory.cache.is_loading_ahead:
            return False
        short = sum(one.computed_tokens >= one.held_tokens for one in self._roster.decoding)
        return short > self._memory.pool.free_blocks + self._memory.evictable_blocks

    # --- decodes ----------------------------------------------------------------------------

    def _decodes(self, now: float) -> list[Sequence]:
        decoding = self._roster.decoding
        short = [one for one in decoding if one.computed_tokens >= one.held_tokens]
        if len(short) <= self._memory.pool.free_blocks:
            for sequence in short:
                self._memory.add_blocks(sequence, 1)
            self._grown = short
            return decoding.copy()
        stalled: set[RequestId] = set()
        for sequence in short:
            if sequence.is_admitted and not self._grow_decode(sequence, now):
                stalled.add(sequence.request_id)
        if not stalled:
            return decoding.copy()
        return [one for one in decoding if one.request_id not in stalled]

    def _grow_decode(self, sequence: Sequence, now: float) -> bool:
        """Make a block for its next token, from younger requests if need be."""
        while not self._grow(sequence, 1, now):
            victim = self._roster.admitted[-1]
            if len(self._roster.admitted) == 1:
                assert self._memory.cache.loading, "a request that fits alone must go on"
                return False
            self._preempt(victim, now)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._memory.release(sequence, now=now)
        if sequence.is_started:
            self._out.append(PreemptRequest(sequence.attempt))
        self._roster.put_back(sequence)

    # --- prompts ----------------------------------------------------------------------------

    def _whole_prompts(self, now: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        room_tokens = self._config.prefill_tokens_per_step
        for sequence in self._roster.prompts:
            self._use_prefix(sequence, now)
            tokens = sequence.uncomputed_tokens
            if chunks and tokens > room_tokens:
                break
            if not self._grow(sequence, tokens, now):
                break
            room_tokens -= tokens
            chunks.append((sequence, StepWork(sequence.request_id, tokens, samples=True)))
        return chunks

    def _chunks(self, decodes: list[Sequence], costs: StepCosts, now: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        room_tokens = self._config.prefill_tokens_per_step
        for sequence in self._prompts(decodes, costs, now):
            if room_tokens <= 0:
                break
            self._use_prefix(sequence, now)
            chunk = self._chunk(sequence, room_tokens, now, must=not chunks)
            if chunk is None:
                break
            room_tokens -= self._whole_tokens(sequence, chunk)
            chunks.append((sequence, chunk))
        return chunks

    def _target_chunks(self, decodes: list[Sequence], costs: StepCosts, now: float) -> list[Chunk]:
        prompts = self._prompts(decodes, costs, now)
        if not prompts:
            return []
        config, chunks = self._config, list[Chunk]()
        left_s = self._allowed_s(decodes, prompts[0], now) - costs.prefill_s
        left_s -= costs.step_time_s(self._shape(decodes, []))
        floor_tokens, room_tokens = config.min_prefill_tokens, config.step_tokens_limit
        for sequence in prompts:
            self._use_prefix(sequence, now)
            token_s = costs.prefill_token_s + costs.prefill_rank_token_s * sequence.rank
            left_s -= costs.cached_token_s * sequence.computed_tokens
            tokens = min(room_tokens, max(floor_tokens, _tokens_within(left_s, token_s)))
            is_sliver = tokens < min(config.min_prefill_tokens, sequence.uncomputed_tokens)
            if tokens <= 0 or (is_sliver and chunks and not floor_tokens):
                break
            if sequence.chunk_tokens > room_tokens:
                break
            chunk = self._chunk(sequence, tokens, now, must=not chunks)
            if chunk is None:
                break
            left_s -= chunk.tokens * self._layers.share(sequence, chunk) * token_s
            floor_tokens = max(0, floor_tokens - self._whole_tokens(sequence, chunk))
            room_tokens -= chunk.tokens
            chunks.append((sequence, chunk))
        return chunks

    def _prompts(self, decodes: list[Sequence], costs: StepCosts, now: float) -> list[Sequence]:
        """Those that are to go on, oldest first."""
        if not self._roster.early:
            return self._roster.prompts
        step_s = costs.step_time_s(self._shape(decodes, []))
        return self._layers.prompts(step_s=step_s, has_decodes=bool(decodes), now=now)

    def _use_prefix(self, sequence: Sequence, now: float) -> None:
        """What was computed since it was admitted, by requests that begin as it does, it has too.

        Two tokens are left at least, so that it stays a prompt.
        """
        if sequence.keys and not sequence.is_started:
            self._memory.use_prefix(sequence, least_tokens=2, now=now)

    def _allowed_s(self, decodes: list[Sequence], first: Sequence, now: float) -> float:
        """How long a step with prompts may take, see the top of this module."""
        config = self._config
        target_s = config.tbt_target_s
        limit_s = max(target_s, config.step_limit_s)
        if not decodes:
            return limit_s
        due_s = [one.next_token_due_s(target_s) for one in decodes if one.first_token_s is not None]
        ahead_s = max(0.0, min(due_s) - now - target_s) if due_s else 0.0
        waited_s = now - first.request.arrived_s
        impatience = min(1.0, max(0.0, waited_s / config.patience_s - 1.0))
        allowed_s = target_s + config.slack_share * ahead_s
        allowed_s += impatience * (limit_s - target_s)
        return min(allowed_s, limit_s)

    def _chunk(self, sequence: Sequence, tokens: int, now: float, *, must: bool) -> StepWork | None:
        """Its work that costs at most so many tokens; `must`: some, if there is memory."""
        if sequence.chunk_tokens:
            return self._layers.go_on(sequence, tokens, must=must)
        memory_tokens = self._memory.obtainable_tokens(sequence)
        tokens = min(tokens, sequence.uncomputed_tokens, memory_tokens)
        if tokens <= 0 or not self._grow(sequence, tokens, now):
            return None
        return self._layers.begin(sequence, tokens)

    def _whole_tokens(self, sequence: Sequence, work: StepWork) -> int:
        """Tokens through all layers that cost as much."""
        return math.ceil(work.tokens * self._layers.share(sequence, work))

    def _grow(self, sequence: Sequence, tokens: int, now: float) -> bool:
        """Make blocks for its next tokens, from adapters that nobody uses if need be."""
        memory = self._memory
        missing_blocks = memory.missing_blocks(sequence, tokens)
        evictions: list[EvictAdapter] | None = []
        if missing_blocks > memory.pool.free_blocks:
            evictions = memory.make_room(missing_blocks, spare=SPARE_NONE, now=now)
        if evictions is None:
            return False
        self._out.extend(evictions)
        if missing_blocks:
            memory.add_blocks(sequence, missing_blocks)
            self._grown.append(sequence)
        return True


def _tokens_within(time_s: float, token_s: float) -> int:
    """Tokens of that cost that fit the time; as many as one likes if they are free."""
    if time_s <= 0:
        return 0
    return int(min(time_s / token_s, _MANY)) if token_s > 0 else _MANY


_MANY = 1 << 30
