"""What surrounds a worker in its tests: a scheduler, gateways and an adapter store, over gRPC."""

import asyncio
import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from calumma.adapter_store.v1 import adapter_store_pb2
from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc
from services.common.adapter_container import ContainerHeader, LoraRows, digest_of, encode
from services.worker.config import WorkerSettings
from services.worker.engine import (
    AdapterIncompatibleError,
    Engine,
    EngineInfo,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
)
from services.worker.engine.profiles import PROFILES
from services.worker.engine.simulated import SimulatedEngine
from services.worker.service import Worker, start

WAIT_S = 10.0
KV_BYTES_PER_TOKEN = 64
INFO = EngineInfo(
    description="simulated quick",
    model_name="quick",
    model_digest="sha256:" + "0" * 64,
    vocab_size=1000,
    eos_token_ids=(2,),
    max_sequences=32,
    max_context_tokens=512,
    pool_blocks=4096,
    block_tokens=8,
    block_bytes=8 * KV_BYTES_PER_TOKEN,
    num_layers=4,
)
QUICK = dataclasses.replace(
    PROFILES["a40-llama-7b"],
    fixed_ms=1.0,
    weights_ms=1.0,
    token_ms=0.0,
    sequence_ms=0.0,
    cached_token_ms=0.0,
    rank_token_ms=0.0,
    decode_rank_ms=0.0,
    prefill_lora_ms=0.0,
    decode_lora_ms=0.0,
    load_bytes_per_s=1e9,
)


def quick_engine(
    step_ms: float = 2.0,
    *,
    pool_blocks: int = INFO.pool_blocks,
    max_sequences: int = INFO.max_sequences,
) -> SimulatedEngine:
    """A simulated engine whose steps all take the same, short time."""
    profile = dataclasses.replace(QUICK, fixed_ms=step_ms / 2, weights_ms=step_ms / 2)
    info = dataclasses.replace(INFO, pool_blocks=pool_blocks, max_sequences=max_sequences)
    return SimulatedEngine(info, profile)


def tokens_alone(engine: Engine, spec: SequenceSpec) -> list[int]:
    """All that the engine draws for this sequence when it is alone."""
    engine.open_sequence(spec)
    known = len(spec.token_ids)
    blocks = tuple(range(-(-(known + spec.max_tokens) // engine.info.block_tokens)))
    tokens: list[int] = []
    for step in range(spec.max_tokens):
        item = StepItem(spec.sequence_id, 1)
        if step == 0:
            item = StepItem(spec.sequence_id, known, new_blocks=blocks)
        (result,) = engine.step([item])
        assert isinstance(result, SampledToken)
        tokens.append(result.token_id)
    engine.close_sequence(spec.sequence_id)
    return tokens


def expected_tokens(item: scheduler_pb2.WorkItem) -> list[int]:
    """What a simulated engine gives for this item, all attempts together."""
    engine = SimulatedEngine(INFO, QUICK, sleep=lambda _: None)
    prompt = tuple(item.token_ids[: item.prompt_tokens])
    sampling = Sampling(seed=item.sampling.seed)
    spec = SequenceSpec("alone", prompt, len(prompt), None, sampling, item.stopping.max_tokens)
    return tokens_alone(engine, spec)


@dataclasses.dataclass(frozen=True)
class Blob:
    """An adapter as the store has it."""

    data: bytes
    rank: int

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    @property
    def ref(self) -> common_pb2.AdapterRef:
        return common_pb2.AdapterRef(
            digest=self.digest, name="made-up", version=1, rank=self.rank, size_bytes=len(self.data)
        )


def make_blob(number: int, *, rank: int = 4, width: int = 64, layers: int = 2) -> Blob:
    """A well-formed blob; each number has its own digest."""
    rows = [
        LoraRows(layer, "q_proj", rank, 1.0, width, width, fill * rank, fill * rank)
        for layer in range(layers)
        for fill in [bytes([number % 256]) * (width * 2)]
    ]
    return Blob(encode(rows, dtype="BF16"), rank)


def work_item(
    request_id: str,
    *,
    gateway_id: str = "gateway-1",
    tokens: int = 8,
    max_tokens: int = 20,
    seed: int | None = None,
    adapter: common_pb2.AdapterRef | None = None,
    time_left_s: float | None = None,
    traceparent: str = "",
) -> scheduler_pb2.WorkItem:
    """A request as the scheduler hands it on."""
    item = scheduler_pb2.WorkItem(
        request_id=request_id,
        attempt=1,
        token_ids=[100 + i for i in range(tokens)],
        prompt_tokens=tokens,
        adapter=adapter,
        sampling=common_pb2.SamplingParams(
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=sum(request_id.encode()) if seed is None else seed,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
        ),
        stopping=common_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        tenant="default",
        predicted_output_tokens=max_tokens,
        gateway_id=gateway_id,
        traceparent=traceparent,
        queue_s=0.25,
    )
    if time_left_s is not None:
        item.time_left.FromNanoseconds(int(time_left_s * 1e9))
    return item


class SchedulerPeer:
    """Takes one worker at a time and writes down what it says."""

    def __init__(self) -> None:
        self.hellos: list[scheduler_pb2.WorkerHello] = []
        self.statuses: list[scheduler_pb2.WorkerStatus] = []
        self.host_caches: list[scheduler_pb2.HostCache] = []
        self.started: Counter[tuple[str, int]] = Counter()
        self.prefilled: Counter[tuple[str, int]] = Counter()
        self.finished: defaultdict[tuple[str, int], list[scheduler_pb2.RequestFinished]]
        self.finished = defaultdict(list)
        self.changed = asyncio.Condition()
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None
        self._context: Any = None

    async def listen(self) -> "SchedulerPeer":
        """Listen at the address that it had before, if it had one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        attach = grpc.stream_stream_rpc_method_handler(
            self._attach,
            request_deserializer=scheduler_pb2.AttachRequest.FromString,
            response_serializer=scheduler_pb2.AttachResponse.SerializeToString,
        )
        service = "calumma.scheduler.v1.SchedulerService"
        handler = grpc.method_handlers_generic_handler(service, {"Attach": attach})
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = self._context = None

    async def _attach(self, request_iterator: Any, context: Any) -> None:
        async for message in request_iterator:
            kind = message.WhichOneof("message")
            async with self.changed:
                match kind:
                    case "hello":
                        self.hellos.append(message.hello)
                        welcome = scheduler_pb2.AttachWelcome(scheduler_id="peer")
                        await context.write(scheduler_pb2.AttachResponse(welcome=welcome))
                        self._context = context
                    case "status":
                        self.statuses.append(message.status)
                    case "host_cache":
                        self.host_caches.append(message.host_cache)
                    case "started":
                        self.started[_key(message.started.attempt)] += 1
                    case "prefilled":
                        assert self.started[_key(message.prefilled.attempt)]
                        self.prefilled[_key(message.prefilled.attempt)] += 1
                    case "finished":
                        self.finished[_key(message.finished.attempt)].append(message.finished)
                    case _:
                        raise AssertionError(kind)
                self.changed.notify_all()

    async def until(self, holds: Callable[[], bool], *, wait_s: float = WAIT_S) -> None:
        """Wait until something is true of what was written down."""
        async with asyncio.timeout(wait_s), self.changed:
            await self.changed.wait_for(holds)

    async def attached(self, times: int = 1) -> None:
        await self.until(lambda: len(self.hellos) >= times)

    async def has_finished(self, request_id: str, attempt: int = 1) -> Any:
        key = (request_id, attempt)
        await self.until(lambda: bool(self.finished[key]))
        return self.finished[key][0]

    async def dispatch(self, *items: scheduler_pb2.WorkItem) -> None:
        batch = scheduler_pb2.DispatchBatch(items=items)
        await self._context.write(scheduler_pb2.AttachResponse(dispatch=batch))

    async def abort(self, request_id: str, attempt: int = 1) -> None:
        named = scheduler_pb2.Attempt(request_id=request_id, attempt=attempt)
        abort = scheduler_pb2.AbortRequest(attempt=named, cause="client_cancelled")
        await self._context.write(scheduler_pb2.AttachResponse(abort=abort))

    async def prefetch(self, *adapters: common_pb2.AdapterRef) -> None:
        hint = scheduler_pb2.PrefetchAdapters(adapters=adapters)
        await self._context.write(scheduler_pb2.AttachResponse(prefetch=hint))

    async def drop(self, digest: str) -> None:
        drop = scheduler_pb2.DropAdapter(digest=digest)
        await self._context.write(scheduler_pb2.AttachResponse(drop=drop))


class StorePeer:
    """Serves blobs, badly where told to."""

    CHUNK_BYTES = 256

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.offsets: list[int] = []  # of every Download that came
        self.metadata: list[dict[str, str]] = []
        self.breaks = 0  # so many streams end in the middle
        self.silences = 0  # so many streams stop without an end
        self.pauses_at: dict[int, asyncio.Event] = {}  # before the part that has this byte
        self.gate = asyncio.Event()
        self.gate.set()
        self._asked = asyncio.Event()
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None

    def add(self, blob: Blob) -> common_pb2.AdapterRef:
        self.blobs[blob.digest] = blob.data
        return blob.ref

    async def listen(self) -> "StorePeer":
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        download = grpc.unary_stream_rpc_method_handler(
            self._download,
            request_deserializer=adapter_store_pb2.DownloadRequest.FromString,
            response_serializer=adapter_store_pb2.DownloadResponse.SerializeToString,
        )
        service = "calumma.adapter_store.v1.AdapterStoreService"
        handler = grpc.method_handlers_generic_handler(service, {"Download": download})
        self._server.add_generic_rpc_handlers((handler,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()
        return self

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def asked(self) -> None:
        """Wait for the first Download."""
        async with asyncio.timeout(WAIT_S):
            await self._asked.wait()

    async def _download(
        self, request: adapter_store_pb2.DownloadRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.DownloadResponse]:
        self.offsets.append(request.offset)
        self._asked.set()
        self.metadata.append(dict(context.invocation_metadata()))
        await self.gate.wait()
        data = self.blobs.get(request.digest)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such adapter")
            return
        for offset in range(request.offset, len(data), self.CHUNK_BYTES):
            if offset > request.offset and self.breaks > 0:
                self.breaks -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            if offset > request.offset and self.silences > 0:
                self.silences -= 1
                await asyncio.sleep(60)
            for position, event in self.pauses_at.items():
                if offset <= position < offset + self.CHUNK_BYTES:
                    await event.wait()
            yield adapter_store_pb2.DownloadResponse(
                offset=offset, data=data[offset : offset + self.CHUNK_BYTES], total_bytes=len(data)
            )


class GatewayPeer:
    """Reads one worker's frames and checks that positions leave no gap."""

    def __init__(self, address: str, gateway_id: str = "gateway-1") -> None:
        self.gateway_id = gateway_id
        # Without probing, gRPC reads at most 64 KiB ahead of whoever reads the stream.
        options = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self.stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.repeated = 0  # tokens that came again
        self.endings: dict[str, worker_pb2.RequestTokens] = {}
        self.ending_frames: Counter[str] = Counter()
        self.frames: list[worker_pb2.StreamTokensResponse] = []
        self.changed = asyncio.Condition()
        self.error: grpc.aio.AioRpcError | None = None
        self.call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def open(self, resume: Sequence[tuple[str, int]] = (), *, reads: bool = True) -> None:
        """(Re)open the stream; `resume` has request ids with the next position wanted."""
        points = [
            worker_pb2.ResumePoint(request_id=name, attempt=1, next_position=position)
            for name, position in resume
        ]
        request = worker_pb2.StreamTokensRequest(gateway_id=self.gateway_id, resume=points)
        self.error = None
        self.call = self.stub.StreamTokens(request)
        await self.call.initial_metadata()
        if reads:
            self.read()

    def read(self) -> None:
        self._reader = asyncio.create_task(self._read(self.call))

    async def break_stream(self) -> None:
        self.call.cancel()
        await self._end_reader()

    async def close(self) -> None:
        if self.call is not None:
            await self.break_stream()
        await self._channel.close()

    async def until(self, holds: Callable[[], bool], *, wait_s: float = WAIT_S) -> None:
        async with asyncio.timeout(wait_s), self.changed:
            await self.changed.wait_for(holds)

    async def has_tokens(self, request_id: str, count: int) -> None:
        await self.until(lambda: len(self.tokens[request_id]) >= count)

    async def ended(self, *request_ids: str) -> worker_pb2.RequestTokens:
        """Wait for the last frames of these requests; return the last one's."""
        await self.until(lambda: all(name in self.endings for name in request_ids))
        return self.endings[request_ids[-1]]

    async def _end_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None

    async def _read(self, call: Any) -> None:
        try:
            async for frame in call:
                async with self.changed:
                    self.frames.append(frame)
                    for part in frame.requests:
                        self._take(part)
                    self.changed.notify_all()
        except grpc.aio.AioRpcError as error:
            async with self.changed:
                self.error = error
                self.changed.notify_all()

    def _take(self, part: worker_pb2.RequestTokens) -> None:
        known = self.tokens[part.request_id]
        assert part.first_position <= len(known), "a gap"
        again = len(known) - part.first_position
        assert list(part.token_ids[:again]) == known[part.first_position :][: len(part.token_ids)]
        self.repeated += min(again, len(part.token_ids))
        known.extend(part.token_ids[again:])
        if part.finish_reason or part.HasField("error"):
            self.endings[part.request_id] = part
            self.ending_frames[part.request_id] += 1


class FaultyEngine:
    """Passes on to another engine, except where told to fail."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self.raises = 0  # so many steps raise
        self.poisoned: set[str] = set()  # sequences whose next token fails
        self.open: set[str] = set()
        self.closed: list[str] = []
        self.incompatible = False
        self.adapters: dict[str, int] = {}  # layers of each that is there
        self.parts: list[StepItem] = []  # that passed some of the layers
        self.most_layers: Counter[str] = Counter()  # that were ever there

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        if self.incompatible:
            raise AdapterIncompatibleError("layer 0 q_proj is not in the base model")
        self._engine.begin_adapter(digest, header, payload, blocks=blocks)
        self.adapters[digest] = 0

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._engine.extend_adapter(digest, layers)
        self.adapters[digest] = self.most_layers[digest] = layers

    def remove_adapter(self, digest: str) -> None:
        self._engine.remove_adapter(digest)
        del self.adapters[digest]

    def open_sequence(self, spec: SequenceSpec) -> None:
        self._engine.open_sequence(spec)
        self.open.add(spec.sequence_id)

    def close_sequence(self, sequence_id: str) -> None:
        self._engine.close_sequence(sequence_id)
        self.open.discard(sequence_id)
        self.closed.append(sequence_id)

    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        if self.raises > 0:
            self.raises -= 1
            raise ArithmeticError("on purpose")
        self.parts += [item for item in items if item.until_layer is not None]
        results = self._engine.step(items)
        return [
            SequenceFailure(result.sequence_id, "not finite")
            if result.sequence_id.split("#")[0] in self.poisoned
            else result
            for result in results
        ]


@dataclasses.dataclass
class Bench:
    """A worker and everything around it."""

    scheduler: SchedulerPeer
    store: StorePeer
    worker: Worker
    engine: FaultyEngine
    gateways: list[GatewayPeer]
    failures: list[str]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is true of the worker."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.002)

    async def gateway(self, gateway_id: str = "gateway-1", *, opens: bool = True) -> GatewayPeer:
        peer = GatewayPeer(self.worker.address, gateway_id)
        self.gateways.append(peer)
        if opens:
            await peer.open()
        return peer


@contextlib.asynccontextmanager
async def bench(
    *, engine: SimulatedEngine | None = None, attach: bool = True, **settings: Any
) -> AsyncGenerator[Bench]:
    """Start all of it; at the end, stop it and check that nothing is left."""
    scheduler, store = SchedulerPeer(), await StorePeer().listen()
    if attach:
        await scheduler.listen()
    faulty = FaultyEngine(engine or quick_engine())
    failures: list[str] = []
    before = asyncio.all_tasks()
    given = WorkerSettings(
        listen="127.0.0.1:0",
        scheduler=scheduler.address if attach else "127.0.0.1:1",
        adapter_store=store.address,
        engine="simulated",
        log_level="warning",
        **settings,
    )
    worker = await start(
        given, build=lambda: faulty, on_failure=lambda: failures.append("worker failed")
    )
    it = Bench(scheduler, store, worker, faulty, [], failures)
    try:
        if attach:
            await scheduler.attached()
        yield it
        if not worker.has_failed:
            assert await worker.driver.wait_idle(WAIT_S), "requests are left"
            worker.core.check_integrity()
            worker.residency.check_integrity()
    finally:
        for gateway in it.gateways:
            await gateway.close()
        await worker.stop(1.0)
        await scheduler.close()
        await store.close()
    if not worker.has_failed:
        assert len(worker.roster) == 0
        assert faulty.open == set()
    mine = {task for task in asyncio.all_tasks() - before if not task.done()}
    names = {task.get_name() for task in mine} & {"driver", "attach", "worker"}
    assert not names, "tasks are left"


def _key(attempt: scheduler_pb2.Attempt) -> tuple[str, int]:
    return attempt.request_id, attempt.attempt
