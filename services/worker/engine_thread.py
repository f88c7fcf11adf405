"""The one thread that steps the engine.

Adapters come into it from loader threads, see `services.worker.intake`; they leave it here.
Opening and closing sequences and dropping adapters are collected and done at the front of the next
step, in the order in which they were asked for, so that a step costs one hop between threads. The
event loop never waits: a step's end is a callback on it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from services.common.adapter_container import ContainerHeader
from services.worker.engine import (
    DistributedEngine,
    Engine,
    EngineInfo,
    EngineLostError,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
)

WARM_UP_TOKENS: Final = 64  # a prompt of the usual kind: first steps take several times longer
_log = structlog.get_logger("engine")
_Operation = Callable[[], None]


@dataclass(frozen=True, slots=True)
class StepEnded:
    """What a step gave. `unopened`: its sequences that the engine had refused to open.

    `error` is set when the engine raised; then there are no results.
    """

    results: list[SampledToken | SequenceFailure]
    unopened: list[str]
    start_s: float
    end_s: float
    error: Exception | None = None


class EngineThread:
    """Serialises all calls of an engine. Its methods belong to the event loop."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._operations: list[_Operation] = []
        self._unopened: set[str] = set()  # only the thread touches these four
        self._using: dict[str, str] = {}  # open sequences' adapters
        self._leaving: dict[
            str, Callable[[], None]
        ] = {}  # adapters to remove once nobody uses them
        self._engine: Engine | None = None
        self._is_stopped = False
        self._end_engine: Callable[[], None] = _nothing  # if it has parts that must be ended
        self._on_lost: Callable[[], None] = _nothing
        self.lost: EngineLostError | None = None  # once a part of the engine is gone

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call it on the event loop when the engine is lost, whatever it was doing."""
        self._on_lost = on_lost

    async def start(self) -> EngineInfo:
        """Build the engine and run its first steps, which are the slowest. Raises as it does."""
        self._loop = asyncio.get_running_loop()
        return await self._loop.run_in_executor(self._executor, self._start)

    def open_sequence(self, spec: SequenceSpec) -> None:
        self._operations.append(partial(self._open, spec))

    def close_sequence(self, sequence_id: str) -> None:
        self._operations.append(partial(self._close, sequence_id))

    def remove_adapter(self, digest: str, on_removed: Callable[[], None]) -> None:
        """`on_removed` is called on the event loop when the engine has let go of its memory.

        That is when no open sequence uses it: a load may fail after a step used its first layers.
        """
        self._operations.append(partial(self._remove, digest, on_removed))

    def run_step(self, items: Sequence[StepItem], on_end: Callable[[StepEnded], None]) -> None:
        """Run a step; `on_end` is called on the event loop."""
        operations, self._operations = self._operations, []
        self._executor.submit(self._step, operations, items, on_end)

    def flush(self) -> None:
        """Do what was collected without waiting for a step."""
        if self._operations:
            operations, self._operations = self._operations, []
            self._executor.submit(self._perform, operations)

    async def stop(self) -> None:
        """Wait for what was begun, and end the thread. A second call does no more."""
        if not self._is_stopped:
            self._is_stopped = True
            self.flush()
            self._executor.submit(self._end)
        await asyncio.to_thread(self._executor.shutdown)

    def _lose(self, error: EngineLostError) -> None:
        self.lost = error
        self._on_lost()

    # --- on a loader thread, while steps run ------------------------------------------------

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...],
    ) -> None:
        """See `Engine`."""
        self._ready.begin_adapter(digest, header, payload, blocks=blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        """See `Engine`."""
        self._ready.extend_adapter(digest, layers)

    # --- on the thread ----------------------------------------------------------------------

    @property
    def _ready(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _start(self) -> EngineInfo:
        self._engine = engine = self._build()
        if isinstance(engine, DistributedEngine):
            self._end_engine = engine.close
            engine.watch(self._note_loss)
        info = engine.info
        pool_tokens = info.pool_blocks * info.block_tokens
        tokens = min(WARM_UP_TOKENS, info.max_context_tokens - 1, pool_tokens - 1)
        blocks = tuple(range(-(-(tokens + 1) // info.block_tokens)))  # nobody has any yet
        spec = SequenceSpec("warm-up", (0,) * tokens, tokens, None, Sampling(), max_tokens=2)
        engine.open_sequence(spec)
        engine.step([StepItem(spec.sequence_id, tokens, new_blocks=blocks)])
        engine.step([StepItem(spec.sequence_id, 1)])
        engine.close_sequence(spec.sequence_id)
        return info

    def _step(
        self,
        operations: list[_Operation],
        items: Sequence[StepItem],
        on_end: Callable[[StepEnded], None],
    ) -> None:
        start_s = time.monotonic()
        self._perform(operations)
        unopened = [item.sequence_id for item in items if item.sequence_id in self._unopened]
        rest = [item for item in items if item.sequence_id not in self._unopened]
        results: list[SampledToken | SequenceFailure] = []
        error = None
        try:
            results = self._ready.step(rest) if rest else []
        except Exception as raised:  # noqa: BLE001 - becomes an event; the driver judges it
            error = raised
        ended = StepEnded(results, unopened, start_s, time.monotonic(), error)
        self._loop.call_soon_threadsafe(on_end, ended)

    def _note_loss(self, error: EngineLostError) -> None:
        """Called on any thread, before whatever call fails because of it has returned."""
        self._loop.call_soon_threadsafe(self._lose, error)

    def _end(self) -> None:
        self._end_engine()

    def _perform(self, operations: list[_Operation]) -> None:
        for operation in operations:
            try:
                operation()
            except Exception:  # noqa: BLE001 - one bad sequence must not stop the others
                _log.exception("engine_operation_failed")

    def _open(self, spec: SequenceSpec) -> None:
        self._unopened.add(spec.sequence_id)
        self._ready.open_sequence(spec)
        self._unopened.remove(spec.sequence_id)
        if spec.adapter_digest is not None:
            self._using[spec.sequence_id] = spec.adapter_digest

    def _close(self, sequence_id: str) -> None:
        self._unopened.discard(sequence_id)
        self._ready.close_sequence(sequence_id)
        digest = self._using.pop(sequence_id, None)
        if digest is not None and digest in self._leaving:
            self._remove(digest, self._leaving.pop(digest))

    def _remove(self, digest: str, on_removed: Callable[[], None]) -> None:
        if digest in self._using.values():
            self._leaving[digest] = on_removed
            return
        try:
            self._ready.remove_adapter(digest)
        finally:
            self._loop.call_soon_threadsafe(on_removed)


def _nothing() -> None:
    """Nothing is to be done."""
