"""A scheduler, a worker and an adapter store as a gateway sees them, driven by a test's hand."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_status import rpc_status
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc
from services.common.errors import Reason, RpcError

T = TypeVar("T")
LIMIT_S = 10.0  # for anything that a test waits for


class Peer:
    """One gRPC server of a test, which can go away and come back on its port."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None

    def register(self, server: grpc.aio.Server) -> None:
        raise AssertionError

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.register(self._server)
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


class SchedulerPeer(Peer, scheduler_pb2_grpc.SchedulerServiceServicer):
    """Records what gateways say, and says what the test tells it to."""

    def __init__(self) -> None:
        super().__init__()
        self.hellos: asyncio.Queue[scheduler_pb2.GatewayHello] = asyncio.Queue()
        self.items: asyncio.Queue[scheduler_pb2.WorkItem] = asyncio.Queue()
        self.cancels: asyncio.Queue[scheduler_pb2.CancelRequest] = asyncio.Queue()
        self.workers: list[WorkerPeer] = []
        self._answers: asyncio.Queue[scheduler_pb2.SubmitResponse] = asyncio.Queue()

    def register(self, server: grpc.aio.Server) -> None:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, server)

    async def Submit(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[scheduler_pb2.SubmitResponse]:
        first = await anext(request_iterator)
        assert first.HasField("hello")
        self._answers = asyncio.Queue()
        self._say(welcome=scheduler_pb2.SubmitWelcome(scheduler_id="s"))
        for worker in self.workers:
            self.name(worker)
        self.hellos.put_nowait(first.hello)
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                yield await self._answers.get()
        finally:
            reader.cancel()

    def Attach(self, request_iterator: Any, context: Any) -> Any:
        raise AssertionError

    def GetState(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def WatchResidency(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def UnloadAdapter(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def name(self, worker: "WorkerPeer", *, attached: bool = True) -> None:
        self._say(
            worker=scheduler_pb2.WorkerAddress(
                worker_id=worker.worker_id, address=worker.address, attached=attached
            )
        )

    def place(
        self,
        item: scheduler_pb2.WorkItem,
        worker: "WorkerPeer",
        *,
        queue_s: float = 0,
        queue: str = "",
        waited_for: str = "",
    ) -> None:
        self._say(
            placed=scheduler_pb2.RequestPlaced(
                attempt=attempt_of(item),
                worker_id=worker.worker_id,
                queue_s=queue_s,
                queue=queue,
                waited_for=waited_for,
            )
        )

    def give_back(self, item: scheduler_pb2.WorkItem, worker: "WorkerPeer") -> None:
        self._say(
            returned=scheduler_pb2.RequestReturned(
                attempt=attempt_of(item), worker_id=worker.worker_id
            )
        )

    def reject(self, item: scheduler_pb2.WorkItem, error: RpcError) -> None:
        self._say(
            rejected=scheduler_pb2.RequestRejected(attempt=attempt_of(item), error=error.to_proto())
        )

    async def next_item(self) -> scheduler_pb2.WorkItem:
        return await soon(self.items.get())

    async def next_cancel(self) -> scheduler_pb2.CancelRequest:
        return await soon(self.cancels.get())

    async def next_hello(self) -> scheduler_pb2.GatewayHello:
        return await soon(self.hellos.get())

    def _say(self, **message: Any) -> None:
        self._answers.put_nowait(scheduler_pb2.SubmitResponse(**message))

    async def _read(self, messages: Any) -> None:
        with contextlib.suppress(grpc.aio.UsageError, grpc.RpcError, asyncio.CancelledError):
            async for message in messages:
                if message.HasField("submit"):
                    self.items.put_nowait(message.submit)
                else:
                    self.cancels.put_nowait(message.cancel)


class WorkerPeer(Peer, worker_pb2_grpc.WorkerServiceServicer):
    """Sends the frames that the test makes."""

    def __init__(self, worker_id: str, encode: Callable[[str], Iterable[int]]) -> None:
        super().__init__()
        self.worker_id = worker_id
        self.opened: asyncio.Queue[worker_pb2.StreamTokensRequest] = asyncio.Queue()
        self._encode = encode
        self.lost_frames = 0  # to be skipped in the count before the next one
        self._frames: asyncio.Queue[worker_pb2.StreamTokensResponse | None] = asyncio.Queue()

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)

    async def StreamTokens(
        self, request: worker_pb2.StreamTokensRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamTokensResponse]:
        frames: asyncio.Queue[worker_pb2.StreamTokensResponse | None] = asyncio.Queue()
        self._frames = frames
        self.opened.put_nowait(request)
        sequence = 0
        while (frame := await frames.get()) is not None:
            sequence += 1 + self.lost_frames
            self.lost_frames = 0
            frame.sequence = sequence
            yield frame

    def GetState(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def Drain(self, request: Any, context: Any) -> Any:
        raise AssertionError

    async def next_opened(self) -> worker_pb2.StreamTokensRequest:
        return await soon(self.opened.get())

    def send(
        self,
        item: scheduler_pb2.WorkItem,
        position: int,
        text: str = "",
        *,
        finish: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED,
        **rest: Any,
    ) -> None:
        tokens = worker_pb2.RequestTokens(
            request_id=item.request_id,
            attempt=item.attempt,
            first_position=position,
            token_ids=list(self._encode(text)),
            finish_reason=finish,
            **rest,
        )
        self._frames.put_nowait(worker_pb2.StreamTokensResponse(requests=[tokens]))

    def break_stream(self) -> None:
        """End the stream and stay alive."""
        self._frames.put_nowait(None)


class StorePeer(Peer, adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Adapters by name; `publish` is seen by Get at once and by Watch unless `watch` is False.

    A resume token is the number of changes that were told; a watch resumes while `resumes` holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, adapter_store_pb2.Adapter] = {}
        self.questions: list[str] = []
        self.resume_tokens: list[str] = []
        self.resumes = True
        self._told: list[adapter_store_pb2.WatchResponse] = []
        self._watchers: list[asyncio.Queue[adapter_store_pb2.WatchResponse]] = []

    def register(self, server: grpc.aio.Server) -> None:
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(self, server)

    def publish(self, name: str, *, watch: bool = True, **aliases: int) -> common_pb2.AdapterRef:
        adapter = self.adapters.setdefault(name, adapter_store_pb2.Adapter(name=name))
        version = len(adapter.versions) + 1
        digest = f"sha256:{abs(hash((name, version))):064x}"
        ref = common_pb2.AdapterRef(
            digest=digest, name=name, version=version, rank=8, size_bytes=1000
        )
        adapter.versions.append(adapter_store_pb2.AdapterVersion(ref=ref))
        adapter.aliases.update(aliases)
        adapter.revision += 1
        if watch:
            self._tell(adapter_store_pb2.WatchResponse(updated=adapter))
        return ref

    def delete(self, name: str) -> None:
        del self.adapters[name]
        self._tell(adapter_store_pb2.WatchResponse(deleted=name))

    async def Watch(
        self, request: adapter_store_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.WatchResponse]:
        self.resume_tokens.append(request.resume_token)
        resumed = self.resumes and bool(request.resume_token)
        changes: asyncio.Queue[adapter_store_pb2.WatchResponse] = asyncio.Queue()
        if resumed:
            for told in self._told[int(request.resume_token) :]:
                changes.put_nowait(told)
        else:
            for adapter in self.adapters.values():
                changes.put_nowait(adapter_store_pb2.WatchResponse(updated=adapter))
        synced = adapter_store_pb2.WatchSynced(resumed=resumed)
        token = str(len(self._told))
        changes.put_nowait(adapter_store_pb2.WatchResponse(synced=synced, resume_token=token))
        self._watchers.append(changes)
        while True:
            yield await changes.get()

    async def Get(
        self, request: adapter_store_pb2.GetRequest, context: Any
    ) -> adapter_store_pb2.GetResponse:
        self.questions.append(request.adapter)
        name, _, selector = request.adapter.partition("@")
        adapter = self.adapters.get(name)
        if adapter is None or (adapter.tenants and request.tenant not in adapter.tenants):
            message = f"no adapter is named {name}"
            error = RpcError(Reason.ADAPTER_NOT_FOUND, message, resource=("adapter", name))
            await context.abort_with_status(rpc_status.to_status(error.to_status()))
            raise AssertionError
        version = int(selector) if selector else len(adapter.versions)
        return adapter_store_pb2.GetResponse(version=adapter.versions[version - 1], adapter=adapter)

    def change(self, name: str, **fields: Any) -> None:
        """Merge fields into an adapter."""
        adapter = self.adapters[name]
        adapter.MergeFrom(adapter_store_pb2.Adapter(**fields))
        adapter.revision += 1
        self._tell(adapter_store_pb2.WatchResponse(updated=adapter))

    def _tell(self, change: adapter_store_pb2.WatchResponse) -> None:
        told = adapter_store_pb2.WatchResponse(resume_token=str(len(self._told) + 1))
        told.MergeFrom(change)
        self._told.append(told)
        for watcher in self._watchers:
            watcher.put_nowait(told)

    def Publish(self, request_iterator: Any, context: Any) -> Any:
        raise AssertionError

    def List(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def Download(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def Delete(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def SetAlias(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def DeleteAlias(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def RollbackAlias(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def SetVisibility(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def Pin(self, request: Any, context: Any) -> Any:
        raise AssertionError

    def Unpin(self, request: Any, context: Any) -> Any:
        raise AssertionError


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait, but not for long."""
    return await asyncio.wait_for(awaitable, LIMIT_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def attempt_of(item: scheduler_pb2.WorkItem) -> scheduler_pb2.Attempt:
    return scheduler_pb2.Attempt(request_id=item.request_id, attempt=item.attempt)


def write_model(folder: Path) -> Tokenizer:
    """A model folder without weights: byte-level tokens, one per letter, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 257,
        "max_position_embeddings": 20_000,
        "eos_token_id": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return tokenizer
