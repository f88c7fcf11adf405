"""What shard 0 tells the other shards' processes, and what they answer.

Two connections to each, so that adapters come in beside the steps:

    steps       Start -> Joining -> Ready; then Run and ClearBlocks, which nobody answers, and
                RemoveAdapter -> Done
    adapters    BeginAdapter, with the descriptor of its memory, -> Done; ExtendAdapter -> Done

Both ends are of one program, and the connections are private to them: messages are pickled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from services.common.adapter_container import ContainerHeader
from services.worker.engine.api import AdapterIncompatibleError, EngineInfo, EngineSettings
from services.worker.engine.executor import Ints, Pass, Segment
from services.worker.engine.parallel_shard import Shard


@dataclass(frozen=True, slots=True)
class Start:
    """Load this shard. `timeout_s`: of a collective, see `ShardGroup`."""

    settings: EngineSettings
    info: EngineInfo
    shard: Shard
    meeting_point: Path
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Joining:
    """The process runs, and joins the group now."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The shard is loaded."""


@dataclass(frozen=True, slots=True)
class PackedPass:
    """A `Pass` that begins: its segments as arrays, with the blocks that they need."""

    token_ids: Ints
    positions: Ints
    wanted: Ints
    digests: tuple[str | None, ...]
    starts: Ints
    rows: Ints
    block_counts: Ints
    blocks: Ints


@dataclass(frozen=True, slots=True)
class PassCall:
    """Take a pass to a layer. `rows`: what it is, when it begins; then it has a new number."""

    number: int
    until_layer: int
    rows: PackedPass | None


@dataclass(frozen=True, slots=True)
class Run:
    """`dropped`: numbers of passes that will not go on."""

    calls: tuple[PassCall, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClearBlocks:
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    digest: str


@dataclass(frozen=True, slots=True)
class BeginAdapter:
    """`header`: of the shard's part, whose memory's descriptor follows."""

    digest: str
    header: ContainerHeader
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExtendAdapter:
    digest: str
    layers: int


@dataclass(frozen=True, slots=True)
class Done:
    """`error`: which of the errors of the call it was, and its message; None: it went well."""

    error: tuple[Literal["incompatible", "memory", "lost"], str] | None = None


def error_of(done: Done) -> Exception | None:
    """What the call raised at the other shard; RuntimeError is none of the expected ones."""
    match done.error:
        case None:
            return None
        case ("incompatible", message):
            return AdapterIncompatibleError(message)
        case ("memory", message):
            return MemoryError(message)
        case (_, message):
            return RuntimeError(message)


def pack(rows: Pass, *, block_tokens: int) -> PackedPass:
    """`rows` has not begun."""
    counts = [-(-segment.end // block_tokens) for segment in rows.segments]
    blocks = [
        block
        for segment, count in zip(rows.segments, counts, strict=True)
        for block in segment.blocks[:count]
    ]
    return PackedPass(
        token_ids=rows.token_ids,
        positions=rows.positions,
        wanted=rows.wanted,
        digests=tuple(segment.digest for segment in rows.segments),
        starts=_ints([segment.start for segment in rows.segments]),
        rows=_ints([segment.rows for segment in rows.segments]),
        block_counts=_ints(counts),
        blocks=_ints(blocks),
    )


def unpack(packed: PackedPass) -> Pass:
    ends = np.cumsum(packed.block_counts).tolist()
    blocks = packed.blocks.tolist()
    firsts = [0, *ends[:-1]]
    columns = (packed.digests, packed.starts.tolist(), packed.rows.tolist(), firsts, ends)
    segments = tuple(
        Segment(digest, start, rows, blocks[first:end])
        for digest, start, rows, first, end in zip(*columns, strict=True)
    )
    return Pass(segments, packed.token_ids, packed.positions, packed.wanted)


def _ints(values: Sequence[int]) -> Ints:
    return np.asarray(values, dtype=np.int32)
