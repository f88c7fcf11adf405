"""What eviction policies are: scores of idle adapters, from what the cache knows of them.

The cache keeps one slot per adapter in arrays, so that a policy scores thousands of idle adapters
with a handful of array operations. A policy sees them as `IdleAdapters` and computes only from the
columns that it asks for.
"""

from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from services.core.costs import StepCosts
from services.core.demand import Demand
from services.core.loadtimes import LineFit
from services.core.types import Adapter, AdapterDigest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Among equal scores: by digest, the one unused for longest, or the smallest goes first.
Tie = Literal["digest", "oldest", "smallest"]
# Among wanted adapters: the least urgent or the one with the lowest score goes first.
WantedOrder = Literal["urgency", "score"]
# Between an adapter and a cached prefix: what saves less time, or was unused for longest, goes.
Exchange = Literal["value", "age"]

_SLOTS_AT_FIRST: Final = 64
_COLUMNS: Final = (
    "blocks",
    "size_bytes",
    "rank",
    "last_used_s",
    "uses",
    "window",
    "window_uses",
    "uses_before",
    "clock",
    "is_far",
    "digest_order",
)
# Of a download until some were measured: a 10 Gbit/s network and a store 20 ms away.
_DOWNLOAD_FIXED_S: Final = 0.02
_DOWNLOAD_BYTE_S: Final = 8e-10
_TIE_COLUMNS: Final[dict[Tie, str]] = {
    "digest": "digest_order",
    "oldest": "last_used_s",
    "smallest": "blocks",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What the cache must know of a policy besides its scores."""

    window_s: float = 300.0  # of the windows in which recent uses are counted
    tie: Tie = "digest"
    wanted_order: WantedOrder = "urgency"
    exchange: Exchange = "value"


class EvictionPolicy(Protocol):
    """Scores idle adapters."""

    @property
    def rules(self) -> Rules:
        """How uses are counted and what scores leave open."""
        ...

    @property
    def clock(self) -> float:
        """Kept with an adapter at each of its uses."""
        ...

    def scores(self, idle: "IdleAdapters") -> Floats:
        """One score per adapter, in order; the lowest is evicted first."""
        ...

    def note_evicted(self, score: float) -> None:
        """An adapter with that score was evicted."""
        ...


class UseTable:
    """The columns, one row ("slot") per adapter in the cache."""

    def __init__(self, window_s: float) -> None:
        self.demand = Demand()
        self.load_byte_s = StepCosts().load_byte_s  # of a load from host memory
        self.downloads = LineFit(fixed_s=_DOWNLOAD_FIXED_S, byte_s=_DOWNLOAD_BYTE_S)
        self._window_s = window_s
        self._columns: dict[str, Floats] = {name: np.zeros(_SLOTS_AT_FIRST) for name in _COLUMNS}
        self._is_idle = np.zeros(_SLOTS_AT_FIRST, dtype=np.bool_)
        self._demand_row = np.zeros(_SLOTS_AT_FIRST, dtype=np.int64)
        self.digests: list[AdapterDigest | None] = []
        self._free: list[int] = []

    def add(self, adapter: Adapter, blocks: int, *, now: float) -> int:
        """A slot for an adapter that is not idle yet."""
        slot = self._free.pop() if self._free else len(self.digests)
        if slot == len(self.digests):
            self.digests.append(None)
            self._fit(len(self.digests))
        self.digests[slot] = adapter.digest
        for column in self._columns.values():
            column[slot] = 0.0
        self._columns["blocks"][slot] = max(1, blocks)
        self._columns["size_bytes"][slot] = adapter.size_bytes
        self._columns["rank"][slot] = adapter.rank
        self._columns["last_used_s"][slot] = now
        self._columns["digest_order"][slot] = _order(adapter.digest)
        self._demand_row[slot] = self.demand.hold(adapter.digest)
        return slot

    def remove(self, slot: int) -> None:
        """Its adapter has left the cache."""
        self.demand.release(int(self._demand_row[slot]))
        self.digests[slot] = None
        self._is_idle[slot] = False
        self._free.append(slot)

    def set_idle(self, slot: int, *, is_idle: bool) -> None:
        """Whether it may be evicted."""
        self._is_idle[slot] = is_idle

    def set_far(self, slot: int, *, is_far: bool) -> None:
        """Whether it is not in host memory, so that to load it again takes a download."""
        self._columns["is_far"][slot] = is_far

    def touch(self, slot: int, *, now: float) -> None:
        """It is or was in use now."""
        self._columns["last_used_s"][slot] = now

    def use(self, slot: int, *, clock: float, now: float) -> None:
        """Another request uses it."""
        columns = self._columns
        window = now // self._window_s
        if window != columns["window"][slot]:
            follows = window == columns["window"][slot] + 1
            columns["uses_before"][slot] = columns["window_uses"][slot] if follows else 0.0
            columns["window"][slot] = window
            columns["window_uses"][slot] = 0.0
        columns["window_uses"][slot] += 1
        columns["uses"][slot] += 1
        columns["clock"][slot] = clock
        columns["last_used_s"][slot] = now

    def idle(self, *, now: float) -> "IdleAdapters":
        """Those that may be evicted, by slot."""
        slots = np.flatnonzero(self._is_idle[: len(self.digests)])
        return IdleAdapters(self, slots, now=now)

    def column(self, name: str, slots: Ints) -> Floats:
        """One value per slot."""
        return self._columns[name][slots]

    def chances(self, slots: Ints) -> Floats:
        """See `IdleAdapters.chances`."""
        return self.demand.chances(self._demand_row[slots])

    def reload_s(self, slots: Ints) -> Floats:
        """See `IdleAdapters.reload_s`."""
        size_bytes, is_far = self.column("size_bytes", slots), self.column("is_far", slots)
        download_s = self.downloads.fixed_s + self.downloads.byte_s * size_bytes
        return np.where(is_far > 0, download_s, self.load_byte_s * size_bytes)

    def reload_one_s(self, size_bytes: int, *, is_far: bool) -> float:
        """Seconds to load an adapter of that size."""
        if is_far:
            return self.downloads.fixed_s + self.downloads.byte_s * size_bytes
        return self.load_byte_s * size_bytes

    def ranked(self, slots: Ints, scores: Floats, *, tie: Tie) -> Ints:
        """Places in `slots`, the lowest score first, equal ones by `tie`."""
        ties = self.column(_TIE_COLUMNS[tie], slots)
        return np.lexsort((slots, ties, scores))

    def recent_uses(self, slots: Ints, *, now: float) -> Floats:
        """See `IdleAdapters.recent_uses`."""
        window, elapsed_s = divmod(now, self._window_s)
        fading = 1.0 - elapsed_s / self._window_s
        windows_ago = window - self.column("window", slots)
        uses, before = self.column("window_uses", slots), self.column("uses_before", slots)
        late = np.where(windows_ago == 1, fading * uses, 0.0)
        return np.where(windows_ago <= 0, uses + fading * before, late)

    def _fit(self, slots: int) -> None:
        if slots <= len(self._is_idle):
            return
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.zeros_like(column)])
        self._is_idle = np.concatenate([self._is_idle, np.zeros_like(self._is_idle)])
        self._demand_row = np.concatenate([self._demand_row, np.zeros_like(self._demand_row)])


class IdleAdapters:
    """The adapters that may be evicted. Every column has one value per adapter, in one order."""

    __slots__ = ("_table", "now_s", "slots")

    def __init__(self, table: UseTable, slots: Ints, *, now: float) -> None:
        self._table = table
        self.slots = slots
        self.now_s = now

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def blocks(self) -> Floats:
        """Blocks that they hold, at least one each."""
        return self._table.column("blocks", self.slots)

    @property
    def ranks(self) -> Floats:
        """LoRA ranks."""
        return self._table.column("rank", self.slots)

    @property
    def last_used_s(self) -> Floats:
        """When the last user came or left; when it was loaded, if none ever did."""
        return self._table.column("last_used_s", self.slots)

    @property
    def uses(self) -> Floats:
        """Requests that used it since it was loaded."""
        return self._table.column("uses", self.slots)

    @property
    def clock(self) -> Floats:
        """The policy's clock at the last use."""
        return self._table.column("clock", self.slots)

    @property
    def reload_s(self) -> Floats:
        """Seconds that it would take to bring it back: from host memory, or from the store."""
        return self._table.reload_s(self.slots)

    @property
    def chances(self) -> Floats:
        """Chance to be the next adapter that is used, see `services.core.demand`."""
        return self._table.chances(self.slots)

    @property
    def recent_uses(self) -> Floats:
        """Uses within the last `Rules.window_s`.

        That of this window plus the fading share of the window before, which needs two numbers per
        adapter. It starts anew when an adapter is loaded again.
        """
        return self._table.recent_uses(self.slots, now=self.now_s)


def _order(digest: AdapterDigest) -> float:
    """A number that grows as the digest does: of its first six characters, as far as they go."""
    text = digest.rpartition(":")[2].encode()[:6]
    return float(int.from_bytes(text.ljust(6, b"\0"), "big"))
