"""Who may start at a worker, and when it is looked at.

Requests are admitted in order of arrival; one that does not fit holds back the younger ones, one
that only waits for its turn to download does not. Two rules, `ReplicaConfig.admission`:

- "promise". Each request is promised memory until its end, and the sum of promises stays within
  the pool (`services.core.ledger`). Safe whatever the others do, but it adds up maxima that never
  occur together.
- "slora". What S-LoRA's router computes: all decode in step, so once the k longest are left and
  the shortest of them ends, they hold `left_k · k + Σ held_i`. The largest of these over k, with
  `left` sorted downwards, must stay below the pool less the adapters in use. With it go a limit on
  the prompt tokens of a new batch, and loads ahead for the next batch at half of the interval
  between two admissions and three steps before its end. `left` follows `Reserve`: the maximum is
  S-LoRA's code, the predicted length a stronger S-LoRA than was ever published.

The peak holds only if all decode in lockstep. They do where prompts are computed whole and nobody
decodes meanwhile. Where chunks and decodes share steps, a request that does not decode yet may
begin its way at any time, so it counts with all it will hold.

Chosen here, where S-LoRA says nothing: a token's block is rounded up for each request; a request
that is alone may start if it fits the pool at all; an adapter that is not in host memory (S-LoRA
has them all there) is downloaded first, and its request admitted once it is here.
"""

from bisect import insort
from typing import Protocol

from services.core.config import ReplicaConfig
from services.core.ledger import Fit
from services.core.memory import SPARE_NONE, DeviceMemory, MemoryDecision, waiting_urgency
from services.core.roster import Roster
from services.core.sequence import Sequence
from services.core.types import Adapter

Growth = tuple[int, int]  # tokens that a request will still add, and tokens that it holds


def is_lockstep(config: ReplicaConfig) -> bool:
    """True if whoever runs gets its tokens in the same steps as all others."""
    return config.admission == "slora" and config.stepping == "whole"


def peak_tokens(growths: list[Growth]) -> int:
    """The most that requests hold together when each step adds one token to each.

    `growths` is sorted downwards. After as many steps as the k-th still adds, the first k are left.
    """
    peak = held_together = 0
    for k, (left, held) in enumerate(growths, start=1):
        held_together += held
        peak = max(peak, left * k + held_together)
    return peak


class Rule(Protocol):
    """Decides what fits beside what runs."""

    def begin(self) -> None:
        """Look at what runs: a new batch is formed."""
        ...

    def fits(self, sequence: Sequence) -> bool:
        """True if the sequence may join the batch."""
        ...

    def add(self, sequence: Sequence) -> None:
        """It has joined."""
        ...


class PromiseRule:
    """The sum of promises stays within the pool."""

    def __init__(self, config: ReplicaConfig, memory: DeviceMemory) -> None:
        self._reserve = config.reserve
        self._memory = memory

    def begin(self) -> None:
        """The ledger knows what runs."""

    def fits(self, sequence: Sequence) -> bool:
        """True if the ledger has room and a slot for the sequence.

        Loads that nobody uses yet hold blocks that cannot be had before they end.
        """
        memory = self._memory
        out_of_reach = memory.cache.unclaimed_loading_blocks(besides=sequence.digest)
        need = memory.need(sequence, self._reserve)
        return memory.ledger.fit(need, unavailable_blocks=out_of_reach) is Fit.FITS

    def add(self, sequence: Sequence) -> None:
        """The ledger knows."""


class PeakRule:
    """The largest memory that all hold together at one time stays within the pool."""

    def __init__(self, config: ReplicaConfig, memory: DeviceMemory, roster: Roster) -> None:
        self._config = config
        self._memory = memory
        self._roster = roster
        self._alone = PromiseRule(config, memory)
        self._is_lockstep = is_lockstep(config)
        self._growths: list[Growth] = []  # of those in lockstep, longest first
        self._apart_tokens = 0  # all that those will hold who are not in lockstep yet
        self._batch_tokens = 0

    def begin(self) -> None:
        """Sort what runs by its remaining length."""
        roster = self._roster
        self._growths = [self._growth(one, is_new=False) for one in roster.decoding]
        self._growths.sort(reverse=True)
        decoding = {one.order for one in roster.decoding}
        apart = [one for one in roster.admitted if one.order not in decoding]
        self._apart_tokens = sum(sum(self._growth(one, is_new=True)) for one in apart)
        self._batch_tokens = 0

    def fits(self, sequence: Sequence) -> bool:
        """True if there is a slot, the batch has room for the prompt, and the peak stays low."""
        memory = self._memory
        if len(memory.ledger) >= memory.capacity.max_requests:
            return False
        batch_tokens = self._batch_tokens + sequence.known_tokens
        if self._batch_tokens and batch_tokens > self._config.prefill_tokens_per_step:
            return False
        if not self._roster.admitted:
            return self._alone.fits(sequence)
        return self._peak_with(sequence) < self._room_tokens(sequence)

    def add(self, sequence: Sequence) -> None:
        """Count it."""
        growth = self._growth(sequence, is_new=True)
        self._batch_tokens += sequence.known_tokens
        if self._is_lockstep:
            insort(self._growths, growth, key=_longest_first)
        else:
            self._apart_tokens += sum(growth)

    def _peak_with(self, sequence: Sequence) -> int:
        growth = self._growth(sequence, is_new=True)
        if not self._is_lockstep:
            return peak_tokens(self._growths) + self._apart_tokens + sum(growth)
        growths = self._growths.copy()
        insort(growths, growth, key=_longest_first)
        return peak_tokens(growths)

    def _room_tokens(self, sequence: Sequence) -> int:
        memory = self._memory
        blocks = memory.capacity.pool_blocks - memory.cache.used_blocks
        blocks -= memory.cache.unclaimed_loading_blocks(besides=sequence.digest)
        adapter = sequence.request.adapter
        if adapter is not None and not memory.cache.has_users(adapter.digest):
            blocks -= memory.capacity.adapter_blocks(adapter)
        return blocks * memory.capacity.block_tokens

    def _growth(self, sequence: Sequence, *, is_new: bool) -> Growth:
        """As S-LoRA counts: a new request has its first token already."""
        capacity = self._memory.capacity
        held = sequence.known_tokens + (1 if is_new else 0)
        left = sequence.reserved_tokens(self._config.reserve) - 1
        left = max(0, min(left, capacity.max_context_tokens - held))
        return left, held + capacity.block_tokens - 1


class Admission:
    """Admits waiting requests and brings their adapters."""

    def __init__(self, config: ReplicaConfig, memory: DeviceMemory, roster: Roster) -> None:
        self._config = config
        self._memory = memory
        self._roster = roster
        self._is_slora = config.admission == "slora"
        self._is_lockstep = is_lockstep(config)
        self._rule: Rule = (
            PeakRule(config, memory, roster) if self._is_slora else PromiseRule(config, memory)
        )
        self._steps = 0  # with decodes, since somebody was admitted
        self._is_settled = False  # nothing has changed since the last look

    def reconsider(self) -> None:
        """Something has come or gone: who did not fit may fit now."""
        self._is_settled = False

    def admit(self, *, is_stepping: bool, now: float) -> list[MemoryDecision]:
        """Admit who may start, if it is time to."""
        if not self._roster.waiting or not self._is_due(is_stepping=is_stepping):
            return []
        self._is_settled = True
        self._rule.begin()
        decisions: list[MemoryDecision] = []
        waiting, index = self._roster.waiting, 0
        while index < len(waiting):
            sequence = waiting[index]
            if self._awaits_turn(sequence):
                index += 1
            elif not self._rule.fits(sequence) or not self._bring_adapter(sequence, decisions, now):
                break
            elif self._is_slora and self._is_downloading(sequence):
                index += 1
            else:
                self._start(sequence, now)
        return decisions

    def finish_step(self, *, has_decodes: bool, now: float) -> list[MemoryDecision]:
        """A step has ended; S-LoRA loads ahead for its next batch at some of them."""
        if not has_decodes and self._config.stepping == "whole":
            return []
        self._steps += 1
        every = self._config.admission_every_steps
        if not self._is_slora or self._steps not in {every // 2, every - 3}:
            return []
        return self._memory.load_ahead(self._next_adapters(), now=now)

    def _is_due(self, *, is_stepping: bool) -> bool:
        if self._is_settled:
            return False
        every = self._config.admission_every_steps
        if not self._roster.admitted or (every == 1 and not self._is_slora):
            return True
        if self._is_lockstep and (self._roster.prompts or self._roster.is_awaiting_loads):
            return False
        return not is_stepping and self._steps >= every

    def _awaits_turn(self, sequence: Sequence) -> bool:
        """True if it must be downloaded, and as many downloads as may be are under way."""
        cache, near, digest = self._memory.cache, self._memory.near, sequence.digest
        if digest is None or digest in cache or digest in near:
            return False
        return cache.downloads(near) >= self._config.max_loads

    def _is_downloading(self, sequence: Sequence) -> bool:
        cache, digest = self._memory.cache, sequence.digest
        if digest is None or cache.is_loaded(digest):
            return False
        return digest not in self._memory.near

    def _bring_adapter(
        self, sequence: Sequence, decisions: list[MemoryDecision], now: float
    ) -> bool:
        """Begin to load its adapter if absent; False when there are no blocks for it."""
        adapter = sequence.request.adapter
        if adapter is None or adapter.digest in self._memory.cache:
            return True
        # Pinned adapters go for a request that is alone: nothing else would ever free memory.
        is_alone = not self._roster.admitted and sequence is self._roster.waiting[0]
        loads = self._memory.load(
            adapter,
            spare=SPARE_NONE if is_alone else waiting_urgency(sequence.order),
            is_ahead=self._is_slora and adapter.digest not in self._memory.near,
            now=now,
        )
        decisions.extend(loads or ())
        return loads is not None

    def _start(self, sequence: Sequence, now: float) -> None:
        self._rule.add(sequence)
        self._memory.promise(sequence, self._config.reserve, now=now)
        digest = sequence.digest
        ready_layers = None if digest is None else self._memory.cache.ready_layers(digest)
        self._roster.admit(sequence, ready_layers=ready_layers)
        self._steps = 0

    def _next_adapters(self) -> list[Adapter]:
        """Those of the batch that would be next if memory did not matter."""
        adapters: list[Adapter] = []
        room_tokens = self._config.prefill_tokens_per_step
        for sequence in self._roster.waiting:
            room_tokens -= sequence.known_tokens
            if room_tokens < 0:
                break
            if sequence.request.adapter is not None:
                adapters.append(sequence.request.adapter)
        return adapters


def _longest_first(growth: Growth) -> tuple[int, int]:
    return -growth[0], -growth[1]
