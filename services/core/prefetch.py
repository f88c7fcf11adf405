"""Adapters that are loaded before a request here needs them, and those that are to stay.

In order: pinned adapters, then those that requests elsewhere in the cluster's queue want (hints),
then those that are likely to be asked for soon (`services.core.forecast`, off by default).

- Requests come first. Nothing is loaded ahead while a request waits for memory, nor into memory
  that is promised; hints and forecasts take no adapter that somebody wants.
- Watermarks. Loads ahead end where they would leave less than `ahead_low_share` of the pool
  unpromised, and go on once `ahead_high_share` is: what the next requests will take is not filled
  with adapters that would have to go at once.
- Cool-down. What the KV cache has taken the memory of is not loaded ahead for `cool_down_s`.
- Pins are a strong preference, not a right: they go for nobody's adapter, but for an admitted
  request's tokens when nothing else is left, and for a request that is alone. They are loaded
  again after. Those beyond `pin_share` of the pool are not honoured, the least important first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from services.core.cache import Urgency
from services.core.config import ReplicaConfig
from services.core.decisions import EvictAdapter, EvictionReason
from services.core.forecast import Forecast
from services.core.memory import (
    SPARE_ALL,
    SPARE_WAITING,
    DeviceMemory,
    MemoryDecision,
    hint_urgency,
    pin_urgency,
    waiting_urgency,
)
from services.core.roster import Roster
from services.core.types import Adapter, AdapterDigest, Pin

_LOOKS: Final = 4  # forecasts per horizon
_RETRY_S: Final = 30.0  # after a load of a pinned adapter has failed


@dataclass(frozen=True, slots=True)
class _Honoured:
    """A pin within the quota."""

    pin: Pin
    urgency: Urgency


class LoadsAhead:
    """Hints, pins and drops of one worker, and the loads that they lead to."""

    def __init__(self, config: ReplicaConfig, memory: DeviceMemory, roster: Roster) -> None:
        self._config = config
        self._memory = memory
        self._roster = roster
        self._hints: tuple[Adapter, ...] = ()
        self._hint_ranks: dict[AdapterDigest, int] = {}
        self._pins: dict[AdapterDigest, _Honoured] = {}
        self._dropped: set[AdapterDigest] = set()
        self._is_open = True  # False: below the low watermark, and not above the high one since
        self._forecast: Forecast | None = None
        if config.forecast_s > 0:
            self._forecast = Forecast(day_offset_s=config.day_offset_s)
        self._forecast_due_s = 0.0
        self._expected: list[Adapter] = []  # absent ones at the last forecast, the best first
        self._worths: dict[AdapterDigest, float] = {}
        self.next_s: float | None = None  # when a load can be tried that is too early now

    @property
    def pin_reasons(self) -> Mapping[AdapterDigest, str]:
        """Of the pins that are honoured."""
        return {digest: honoured.pin.reason for digest, honoured in self._pins.items()}

    def urgency_of(self, digest: AdapterDigest) -> Urgency | None:
        """How much it is wanted: by a pin, by a request that waits here, by a hint."""
        honoured = self._pins.get(digest)
        if honoured is not None:
            return honoured.urgency
        sequence = self._roster.first_wanting(digest)
        if sequence is not None:
            return waiting_urgency(sequence.order)
        rank = self._hint_ranks.get(digest)
        return None if rank is None else hint_urgency(rank)

    def set_hints(self, hints: tuple[Adapter, ...]) -> None:
        """Requests elsewhere want these, the most urgent first."""
        self._hints = hints[: self._config.max_hints]
        ranked = [*enumerate(self._hints)]
        self._hint_ranks = {hint.digest: rank for rank, hint in reversed(ranked)}

    def set_pins(self, pins: tuple[Pin, ...]) -> None:
        """These are to stay, the most important first; those beyond the quota are not honoured."""
        capacity = self._memory.capacity
        left_blocks = int(self._config.pin_share * capacity.pool_blocks)
        self._pins = {}
        for pin in pins:
            blocks = capacity.adapter_blocks(pin.adapter)
            if pin.adapter.digest in self._pins or blocks > left_blocks:
                continue
            left_blocks -= blocks
            urgency = pin_urgency(len(self._pins))
            self._pins[pin.adapter.digest] = _Honoured(pin, urgency)

    def note_request(self, adapter: Adapter | None, *, now: float) -> None:
        """A request has come here."""
        if self._forecast is not None and adapter is not None:
            self._forecast.note(adapter, now=now)

    def drop(self, digest: AdapterDigest) -> None:
        """It goes as soon as nobody here needs it."""
        self._forget(digest)
        self._memory.cache.demand.forget(digest)
        if digest in self._memory.cache:
            self._dropped.add(digest)

    def note_failed(self, digest: AdapterDigest, *, now: float) -> None:
        """Its load has failed: a hint is tried when it is hinted again, a pin some time later."""
        self.set_hints(tuple(hint for hint in self._hints if hint.digest != digest))
        self._dropped.discard(digest)
        self._expected = [adapter for adapter in self._expected if adapter.digest != digest]
        if digest in self._pins:
            self._memory.cool_down.begin(digest, until_s=now + _RETRY_S, now=now)

    def evict_dropped(self) -> list[MemoryDecision]:
        """Take out what was dropped and is not needed any more."""
        decisions: list[MemoryDecision] = []
        cache = self._memory.cache
        for digest in sorted(self._dropped):
            if digest not in cache:
                self._dropped.discard(digest)
            elif cache.is_evictable(digest) and self._roster.first_wanting(digest) is None:
                self._dropped.discard(digest)
                self._memory.drop(digest)
                self._memory.drop_prefixes(digest)  # of those that needed it so far
                decisions.append(EvictAdapter(digest, EvictionReason.DROPPED))
        return decisions

    def load(self, *, now: float) -> list[MemoryDecision]:
        """Evict what was dropped, and begin the loads that may be begun now."""
        decisions = self.evict_dropped() if self._dropped else []
        self.next_s = None
        if self._forecast is not None and len(self._forecast):
            self._look_ahead(self._forecast, now)
        if self._roster.waiting or not (self._pins or self._hints or self._expected):
            return decisions
        loads = min(self._config.max_hint_loads, self._config.max_loads)
        for adapter, spare in self._absent(now):
            if self._memory.cache.loading >= loads or not self._has_room(adapter):
                break
            begun = self._memory.load(adapter, spare=spare, is_prefetch=True, now=now)
            if begun is None:
                return decisions
            decisions.extend(begun)
        decisions.extend(self._load_expected(loads, now))
        return decisions

    def _load_expected(self, loads: int, now: float) -> list[MemoryDecision]:
        """Those of the forecast, into free blocks and those of idle adapters worth less."""
        decisions: list[MemoryDecision] = []
        for adapter in self._expected:
            if self._memory.cache.loading >= loads:
                break
            if not self._is_due(adapter.digest, now) or not self._has_room(adapter):
                continue
            worth = self._worths[adapter.digest]
            begun = self._memory.load(
                adapter,
                spare=SPARE_ALL,
                is_prefetch=True,
                may_evict=lambda digest, worth=worth: self._worths.get(digest, 0.0) < worth,  # type: ignore[misc]
                now=now,
            )
            decisions.extend(begun or ())
        return decisions

    def _look_ahead(self, forecast: Forecast, now: float) -> None:
        """Renew the forecast a few times per horizon."""
        config, cache = self._config, self._memory.cache
        if now >= self._forecast_due_s:
            self._forecast_due_s = now + config.forecast_s / _LOOKS
            self._worths, likely = {}, list[Adapter]()
            chances = forecast.chances(cache.demand, horizon_s=config.forecast_s, now=now)
            for adapter, chance in chances:
                blocks = max(1, self._memory.capacity.adapter_blocks(adapter))
                self._worths[adapter.digest] = chance * cache.reload_s(adapter) / blocks
                if chance >= config.forecast_chance and adapter.digest not in cache:
                    likely.append(adapter)
            likely.sort(key=lambda one: (-self._worths[one.digest], one.digest))
            self._expected = likely[: config.max_hints]
        self.next_s = self._forecast_due_s

    def _absent(self, now: float) -> Iterator[tuple[Adapter, Urgency]]:
        """What should be here and is not, the most urgent first, and what may go for it."""
        for honoured in self._pins.values():
            if self._is_due(honoured.pin.adapter.digest, now):
                yield honoured.pin.adapter, SPARE_WAITING
        for hint in self._hints:
            if self._is_due(hint.digest, now):
                yield hint, SPARE_ALL

    def _is_due(self, digest: AdapterDigest, now: float) -> bool:
        if digest in self._memory.cache or digest in self._dropped:
            return False
        until_s = self._memory.cool_down.until_s(digest, now=now)
        if until_s is None:
            return True
        self.next_s = until_s if self.next_s is None else min(self.next_s, until_s)
        return False

    def _has_room(self, adapter: Adapter) -> bool:
        """True if its blocks leave enough that is not promised, see the watermarks above."""
        pool_blocks = self._memory.capacity.pool_blocks
        left_blocks = self._memory.unpromised_blocks(self._kept())
        if left_blocks >= self._config.ahead_high_share * pool_blocks:
            self._is_open = True
        left_blocks -= self._memory.capacity.adapter_blocks(adapter)
        if left_blocks < self._config.ahead_low_share * pool_blocks:
            self._is_open = False
        return self._is_open

    def _kept(self) -> Iterator[AdapterDigest]:
        """What loads ahead have brought and shall not take the place of."""
        yield from self._pins
        for digest in self._hint_ranks:
            if digest not in self._pins:
                yield digest

    def _forget(self, digest: AdapterDigest) -> None:
        self._pins.pop(digest, None)
        self._expected = [adapter for adapter in self._expected if adapter.digest != digest]
        if self._forecast is not None:
            self._forecast.forget(digest)
        self.set_hints(tuple(hint for hint in self._hints if hint.digest != digest))
