"""One model over several devices of a machine, as one engine (tensor parallelism).

Shard 0 is in this process, each other one in a process of its own (`parallel_team`); what a shard
holds is in `parallel_shard`, how an adapter is cut in `services.worker.lora.sharding`. All shards
get every call in the same order, and a step's collectives (`parallel_group`) keep them together.
Only shard 0 samples.

Memory is counted for one shard: `EngineInfo.block_bytes`, and the bytes of the pool. A block holds
the keys and values of a shard's heads, so a pool of the same bytes has as many times the blocks. An
adapter is charged for all its bytes, of which a shard holds a part.

Adapters come in on a loader thread, while steps run, over connections of their own; when
`extend_adapter` returns, every shard has the layers.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from services.common.adapter_container import ContainerHeader
from services.common.base_model import ModelConfig, load_config
from services.worker.engine.api import EngineInfo, EngineLostError, EngineSettings
from services.worker.engine.build import describe, torch_executor
from services.worker.engine.executor import Executor, Pass, Scores
from services.worker.engine.parallel_group import ShardGroup, check_is_free
from services.worker.engine.parallel_memory import SharedMemory
from services.worker.engine.parallel_shard import Shard, ShardingError, check_divides
from services.worker.engine.parallel_team import START_TIMEOUT_S, Team
from services.worker.engine.parallel_wire import (
    BeginAdapter,
    ClearBlocks,
    Done,
    ExtendAdapter,
    Joining,
    PassCall,
    Ready,
    RemoveAdapter,
    Run,
    Start,
    error_of,
    pack,
)
from services.worker.engine.runner import ModelEngine
from services.worker.engine.sampling import Draw, SamplingRow
from services.worker.lora.layout import check_fits
from services.worker.lora.sharding import AdapterShard, entries_below, shard_adapter

# Of one collective, and of an answer: shards are apart by less than a step, which takes seconds.
STEP_TIMEOUT_S: Final = 60.0


class ParallelEngine(ModelEngine):
    """A `ModelEngine` whose shards' processes end with `close`, or with this process."""

    def __init__(self, info: EngineInfo, executor: "ParallelExecutor") -> None:
        super().__init__(info, executor)
        self._shards = executor

    def watch(self, on_lost: Callable[[EngineLostError], None]) -> None:
        """See `DistributedEngine`."""
        self._shards.watch(on_lost)

    def close(self) -> None:
        self._shards.close()


def build_parallel_engine(
    settings: EngineSettings, folder: Path, *, timeout_s: float = STEP_TIMEOUT_S
) -> ParallelEngine:
    """Start the other shards' processes and load all shards.

    Raises BaseModelError, ValueError (ShardingError among them) and EngineLostError.
    """
    whole = load_config(folder)
    _check(settings, whole)
    shard = Shard(0, settings.tensor_parallel)
    info = describe(settings, folder, shard.config(whole))
    executor = ParallelExecutor(whole, _start(settings, info, timeout_s=timeout_s), info)
    without_native = "compiled code computes on one device" if settings.device == "cpu" else None
    info = replace(info, description=executor.description, without_native=without_native)
    return ParallelEngine(info, executor)


def build_shard(start: Start, *, on_group: Callable[[ShardGroup], None] | None = None) -> Executor:
    """Join the others, then load a shard, in its process. `on_group`: told once it has joined."""
    shard, settings = start.shard, start.settings
    if settings.threads is not None:
        torch.set_num_threads(max(1, settings.threads // shard.count))
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", shard.index)
        torch.cuda.set_device(device)
    group = ShardGroup(shard, start.meeting_point, device=device, timeout_s=start.timeout_s)
    if on_group is not None:
        on_group(group)
    assert settings.model is not None
    config = shard.config(load_config(settings.model))
    return torch_executor(settings, config, start.info, group=group)


def _check(settings: EngineSettings, whole: ModelConfig) -> None:
    check_divides(whole, settings.tensor_parallel)
    check_is_free()
    if settings.tier == "native":
        raise ShardingError("compiled code computes on one device; several need the torch tier")
    devices = torch.cuda.device_count()
    if settings.device == "cuda" and devices < settings.tensor_parallel:
        raise ShardingError(
            f"{settings.tensor_parallel} shards need as many devices, not {devices}"
        )


class _Shards:
    """All of a running engine's: the processes, this process's own, and what binds them."""

    def __init__(self, count: int, *, timeout_s: float) -> None:
        self.group: ShardGroup | None = None
        # The group may look at the file of its meeting point for as long as it lives.
        self._folder = TemporaryDirectory(prefix="calumma-shards-")
        self.team = Team(count, timeout_s=timeout_s)
        self.team.watch(self._abort)

    def load(self, settings: EngineSettings, info: EngineInfo, *, timeout_s: float) -> Executor:
        """Raises as `build_parallel_engine` does."""
        place = Path(self._folder.name) / "meeting-point"
        shards = [Shard(index, self.team.count) for index in range(self.team.count)]
        first, *others = [Start(settings, info, shard, place, timeout_s) for shard in shards]
        for peer, start in zip(self.team.peers, others, strict=True):
            self.team.send(peer, peer.steps, start)
        self.team.await_all(Joining, timeout_s=START_TIMEOUT_S)
        own = build_shard(first, on_group=self._keep)
        self.team.await_all(Ready, timeout_s=START_TIMEOUT_S)
        return own

    def end(self) -> None:
        self.team.close()
        if self.group is not None:
            self.group.leave()
            self.group = None
        self._folder.cleanup()

    def _keep(self, group: ShardGroup) -> None:
        self.group = group

    def _abort(self, lost: EngineLostError) -> None:
        del lost
        if (group := self.group) is not None:
            group.abort()


@dataclass(frozen=True, slots=True)
class _Loaded:
    shards: _Shards
    own: Executor


def _start(settings: EngineSettings, info: EngineInfo, *, timeout_s: float) -> _Loaded:
    shards = _Shards(settings.tensor_parallel, timeout_s=timeout_s)
    try:
        return _Loaded(shards, shards.load(settings, info, timeout_s=timeout_s))
    except BaseException:
        shards.end()
        raise


class _Part:
    """A pass under way: this shard's own, and the number that the others know it by."""

    def __init__(self, number: int, rows: Pass) -> None:
        self.number = number
        self.rows = Pass(rows.segments, rows.token_ids, rows.positions, rows.wanted)


@dataclass(slots=True)
class _Arriving:
    """An adapter on its way: where its bytes come, and the memory of each shard's part."""

    payload: memoryview
    parts: tuple[AdapterShard, ...]
    memory: tuple[memoryview, ...]
    copied: int = 0  # modules, in the payload's order

    def copy(self, entries: int) -> None:
        """Cut the first so many modules for every shard."""
        for part, memory in zip(self.parts, self.memory, strict=True):
            part.copy(self.payload, memory, entries=slice(self.copied, entries))
        self.copied = entries


class ParallelExecutor:
    """See `Executor`. Every call raises EngineLostError once a shard is gone."""

    def __init__(self, whole: ModelConfig, loaded: _Loaded, info: EngineInfo) -> None:
        """`whole`: the shape of the model. `info`: of one shard."""
        self._whole = whole
        self._info = info
        self._own = loaded.own
        self._team = loaded.shards.team
        self._loading = threading.Lock()  # one question and its answers at a time
        self._arriving: dict[str, _Arriving] = {}
        self._ready: dict[str, int] = {}
        self._numbers = count()
        self._dropped: deque[int] = deque()
        self._end = weakref.finalize(self, loaded.shards.end)

    @property
    def description(self) -> str:
        return f"{self._own.description}, {self._team.count} shards"

    def watch(self, on_lost: Callable[[EngineLostError], None]) -> None:
        """See `DistributedEngine`."""
        self._team.watch(on_lost)

    def close(self) -> None:
        """End the other shards' processes."""
        self._end()

    def begin_adapter(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None:
        check_fits(header, self._whole)
        self._team.check()
        shards = (Shard(index, self._team.count) for index in range(self._team.count))
        parts = tuple(shard_adapter(header, shard) for shard in shards)
        own = memoryview(bytearray(parts[0].header.payload_bytes))
        shared = [SharedMemory(part.header.payload_bytes) for part in parts[1:]]
        with self._loading:
            try:
                self._send_begin(digest, [part.header for part in parts[1:]], shared, blocks)
            finally:
                for memory in shared:
                    memory.settle()
            self._own.begin_adapter(digest, parts[0].header, own, blocks)
            self._raise_first(self._team.await_adapters())
        memory_of = (own, *(memory.view for memory in shared))
        self._arriving[digest] = _Arriving(payload, parts, memory_of)
        self._ready[digest] = 0

    def extend_adapter(self, digest: str, layers: int) -> None:
        arriving = self._arriving[digest]
        last = self._whole.num_layers
        arriving.copy(entries_below(arriving.parts[0].whole, layers, num_layers=last))
        with self._loading:
            self._team.check()
            for peer in self._team.peers:
                self._team.send(peer, peer.adapters, ExtendAdapter(digest, layers))
            try:
                self._own.extend_adapter(digest, layers)
            finally:
                answers = self._team.await_adapters()
            self._raise_first(answers)
        self._ready[digest] = layers
        if layers == last:
            del self._arriving[digest]

    def remove_adapter(self, digest: str) -> None:
        self._arriving.pop(digest, None)
        del self._ready[digest]
        self._own.remove_adapter(digest)
        with suppress(EngineLostError):  # then there is nothing left to remove it from
            self._team.tell(RemoveAdapter(digest))
            self._team.await_all(Done)

    def ready_layers(self, digest: str) -> int:
        return self._ready[digest]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self._team.tell(ClearBlocks(tuple(blocks)))
        self._own.clear_blocks(blocks)

    def run(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> Scores | None:
        parts = [self._part_of(rows) for rows in passes]
        self._team.tell(self._call(passes, parts, until_layers))
        try:
            scores = self._own.run([part.rows for part in parts], until_layers)
        except Exception as error:
            # Whatever it was, the other shards are somewhere in this step, and stay there.
            raise self._team.lose(f"a step failed at shard 0: {error}") from error
        for rows, part in zip(passes, parts, strict=True):
            rows.layers = part.rows.layers
            rows.state = None if part.rows.state is None else part
        return None if scores is None else _SafeScores(scores, self._team)

    def _part_of(self, rows: Pass) -> _Part:
        if rows.state is None:
            part = _Part(next(self._numbers), rows)
            # Its sequence may be closed while it is under way: the others forget it, too.
            weakref.finalize(part, self._dropped.append, part.number).atexit = False
            return part
        assert isinstance(rows.state, _Part)
        return rows.state

    def _call(
        self, passes: Sequence[Pass], parts: Sequence[_Part], until_layers: Sequence[int]
    ) -> Run:
        block_tokens = self._info.block_tokens
        calls = tuple(
            PassCall(
                part.number,
                until,
                pack(rows, block_tokens=block_tokens) if rows.state is None else None,
            )
            for rows, part, until in zip(passes, parts, until_layers, strict=True)
        )
        dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
        return Run(calls, dropped)

    def _send_begin(
        self,
        digest: str,
        headers: Sequence[ContainerHeader],
        shared: Sequence[SharedMemory],
        blocks: Sequence[int],
    ) -> None:
        for peer, header, memory in zip(self._team.peers, headers, shared, strict=True):
            message = BeginAdapter(digest, header, tuple(blocks))
            self._team.send(peer, peer.adapters, message)
            try:
                memory.send(peer.adapters, peer.process.pid)
            except OSError as error:
                raise self._team.lose(f"an adapter can't be shared: {error}") from error

    def _raise_first(self, answers: Sequence[Done]) -> None:
        for error in filter(None, map(error_of, answers)):
            if isinstance(error, RuntimeError):
                raise self._team.lose(f"a shard failed at an adapter: {error}")
            raise error


class _SafeScores:
    """See `Scores`. What is drawn after a shard was lost is no draw."""

    def __init__(self, scores: Scores, team: Team) -> None:
        self._scores = scores
        self._team = team

    def draw(self, rows: Sequence[SamplingRow]) -> list[Draw | None]:
        draws = self._scores.draw(rows)
        self._team.check()
        return draws
