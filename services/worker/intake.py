"""What happens to an adapter's bytes while they arrive: verified, then handed to the engine.

The event loop only writes bytes and says how many are there. Hashing and the engine's part run on
a loader thread, one job at a time per adapter: a job takes all that has come, and what comes
meanwhile is the next one's. No thread waits for the network, so a store that hangs holds none. The
engine gets layers in a few parts, each once every byte of it is verified.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Protocol

from services.common.adapter_container import BlobVerifier, ContainerError, ContainerHeader
from services.core.types import Adapter

PARTS_MAX: Final = 8  # of an adapter whose memory the engine uses where it is
COPIES_MAX: Final = 4  # of one that it copies to a device of its own: each copy has its price
_FEED_BYTES: Final = 2**21  # hashed between two looks at what is complete


class AdapterEngine(Protocol):
    """What a loader thread may call, see `Engine`."""

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...],
    ) -> None: ...

    def extend_adapter(self, digest: str, layers: int) -> None: ...


# Told on the loader thread that the engine has the first so many layers, but not yet all.
OnLayers = Callable[[int], None]


class Intake:
    """One adapter on its way into the engine. `take` belongs to a loader thread."""

    def __init__(
        self,
        adapter: Adapter,
        blob: memoryview,
        *,
        blocks: tuple[int, ...],
        engine: AdapterEngine,
        num_layers: int,
        parts_max: int,
        on_layers: OnLayers,
    ) -> None:
        self.has_begun = False  # the engine knows of it, and must be told to remove it
        self._adapter = adapter
        self._blob = blob
        self._blocks = blocks
        self._engine = engine
        self._num_layers = num_layers
        self._parts = parts(num_layers, parts_max)
        self._on_layers = on_layers
        self._verifier = BlobVerifier(adapter.digest)
        self._taken_bytes = 0
        self._ready_layers = 0

    def take(self, received_bytes: int) -> None:
        """The blob is there up to `received_bytes`.

        Raises ContainerError and AdapterIncompatibleError.
        """
        while self._taken_bytes < received_bytes:
            end = min(received_bytes, self._taken_bytes + _FEED_BYTES)
            self._verifier.feed(self._blob[self._taken_bytes : end])
            self._taken_bytes = end
            if self._verifier.header is not None:
                self._hand_on(self._verifier.header)

    def check_is_complete(self) -> None:
        """Raises ContainerError."""
        if not self._verifier.is_complete:
            raise ContainerError("the blob ends before its last layer")

    def _hand_on(self, header: ContainerHeader) -> None:
        if not self.has_begun:
            if header.total_bytes != self._adapter.size_bytes:
                raise ContainerError(
                    f"{header.total_bytes} bytes, where {self._adapter.size_bytes} were promised"
                )
            begin(self._engine, self._adapter, header, blob=self._blob, blocks=self._blocks)
            self.has_begun = True
        layers = self._num_layers
        if not self._verifier.is_complete:
            there = header.layers_within(self._verifier.verified_bytes, num_layers=layers)
            layers = max((n for n in self._parts[:-1] if n <= there), default=0)
        if layers > self._ready_layers:
            self._engine.extend_adapter(self._adapter.digest, layers)
            self._ready_layers = layers
            if not self._verifier.is_complete:
                self._on_layers(layers)


class ArrivingBytes:
    """Runs `Intake.take` behind the bytes that arrive. Its methods belong to the event loop."""

    def __init__(self, intake: Intake, executor: Executor) -> None:
        self._intake = intake
        self._executor = executor
        self._received_bytes = 0
        self._given_bytes = 0
        self._job: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def note(self, received_bytes: int) -> None:
        """So many bytes are there. Raises what `take` did: more of them are of no use."""
        if self._error is not None:
            raise self._error
        self._received_bytes = received_bytes
        if self._job is None:
            self._begin_job()

    async def settle(self) -> None:
        """Wait until the thread is done with what has come, or with its failure."""
        while self._job is not None:
            await asyncio.wait([self._job])
            await asyncio.sleep(0)  # for the job's callback

    async def finish(self) -> None:
        """All bytes have come: wait until the engine has them. Raises as `take` does."""
        await self.settle()
        if self._error is not None:
            raise self._error
        self._intake.check_is_complete()

    def _begin_job(self) -> None:
        self._given_bytes = self._received_bytes
        loop = asyncio.get_running_loop()
        self._job = loop.run_in_executor(self._executor, self._intake.take, self._given_bytes)
        self._job.add_done_callback(self._end_job)

    def _end_job(self, job: asyncio.Future[None]) -> None:
        self._job = None
        if job.cancelled():
            self._error = asyncio.CancelledError()
        elif (error := job.exception()) is not None:
            self._error = error
        elif self._received_bytes > self._given_bytes:
            self._begin_job()


def parts(num_layers: int, parts_max: int) -> list[int]:
    """How many layers are there after each part: at most so many, the last with all.

    The first are small, so that a prompt begins early, and so are the last, because what comes last
    is still to be computed when the load has ended.
    """
    # 3 x^2 - 2 x^3, which rises from 0 to 1, slowly at both ends.
    shares = (part**2 * (3 * parts_max - 2 * part) for part in range(1, parts_max + 1))
    return sorted({-(-num_layers * share // parts_max**3) for share in shares})


def begin(
    engine: AdapterEngine,
    adapter: Adapter,
    header: ContainerHeader,
    *,
    blob: memoryview,
    blocks: tuple[int, ...],
) -> None:
    """Tell the engine where the rows of a blob are or will be, and which blocks they may take."""
    payload = blob[header.payload_offset : header.total_bytes]
    engine.begin_adapter(adapter.digest, header, payload, blocks=blocks)
