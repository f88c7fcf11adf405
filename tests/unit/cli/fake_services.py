"""Small servers that speak the protos, for tests of what talks to them."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc
from services.common.errors import Reason, RpcError

DIGEST = "sha256:" + "ab12" * 16
INFERENCE = "calumma.gateway.v1.InferenceService"
STORE = "calumma.adapter_store.v1.AdapterStoreService"
SCHEDULER = "calumma.scheduler.v1.SchedulerService"
WORKER = "calumma.worker.v1.WorkerService"


def fail(context: grpc.ServicerContext, error: RpcError) -> NoReturn:
    context.abort_with_status(rpc_status.to_status(error.to_status()))
    raise AssertionError


def unimplemented(_self: Any, _request: Any, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this test")
    raise AssertionError


@contextmanager
def served(name: str, register: Callable[[grpc.Server], Any]) -> Generator[str]:
    """A server with health and reflection on a free port; yields its address."""
    server = grpc.server(ThreadPoolExecutor(8))
    register(server)
    healths = health.HealthServicer()
    healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    reflection.enable_server_reflection([name, reflection.SERVICE_NAME], server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def adapter_ref(name: str, version: int = 1) -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(
        digest=DIGEST, name=name, version=version, rank=16, size_bytes=3_500_000
    )


class FakeInference(gateway_pb2_grpc.InferenceServiceServicer):
    """Answers with the prompt's words in reverse. Adapters: "none" fails, "slow" never ends."""

    def __init__(self) -> None:
        self.requests: list[gateway_pb2.GenerateStreamRequest] = []
        self.cancelled = threading.Event()

    def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GenerateResponse:
        streamed = gateway_pb2.GenerateStreamRequest.FromString(request.SerializeToString())
        response = gateway_pb2.GenerateResponse()
        for event in self.GenerateStream(streamed, context):
            response.text += event.chunk.text
            response.token_ids.extend(event.chunk.token_ids)
            if event.HasField("started"):
                response.request_id = event.started.request_id
            if event.HasField("finished"):
                response.completion.CopyFrom(event.finished)
        return response

    def GenerateStream(
        self, request: gateway_pb2.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateStreamResponse]:
        self.requests.append(request)
        context.add_callback(self.cancelled.set)
        self._check(request, context)
        started = gateway_pb2.GenerateStarted(request_id="r-1", prompt_tokens=3)
        if request.adapter:
            started.adapter.CopyFrom(adapter_ref(request.adapter.partition("@")[0]))
        yield gateway_pb2.GenerateStreamResponse(started=started)
        if request.adapter == "broken":
            return
        text = request.chat.messages[-1].content if request.HasField("chat") else request.prompt
        words = text.split()[::-1]
        for position, word in enumerate(words):
            piece = word if position == 0 else f" {word}"
            chunk = gateway_pb2.GenerateChunk(text=piece, token_ids=[position])
            yield gateway_pb2.GenerateStreamResponse(chunk=chunk)
        while request.adapter == "slow" and context.is_active():
            time.sleep(0.02)
        yield gateway_pb2.GenerateStreamResponse(finished=self._completion(request, words))

    def _check(
        self, request: gateway_pb2.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> None:
        if request.adapter == "none":
            resource = ("adapter", "none")
            message = "no adapter is called none"
            fail(
                context,
                RpcError(Reason.ADAPTER_NOT_FOUND, message, field="adapter", resource=resource),
            )
        if request.sampling.temperature > 2:
            message = "temperature is 0 to 2"
            fail(
                context,
                RpcError(Reason.INVALID_FIELD, message, field="sampling.temperature"),
            )
        if request.adapter == "busy":
            fail(context, RpcError(Reason.QUEUE_FULL, "the queue is full", retry_after_s=1.5))

    def _completion(
        self, request: gateway_pb2.GenerateStreamRequest, words: list[str]
    ) -> gateway_pb2.Completion:
        tier = common_pb2.ADAPTER_TIER_DEVICE if request.adapter else common_pb2.ADAPTER_TIER_NONE
        return gateway_pb2.Completion(
            finish_reason=common_pb2.FINISH_REASON_STOP,
            usage=gateway_pb2.Usage(prompt_tokens=3, output_tokens=len(words)),
            timings=common_pb2.RequestTimings(
                queue_s=0.0, prefill_s=0.1, decode_s=0.5, adapter_tier=tier
            ),
            time_to_first_token_s=0.12,
            worker_id="w-1",
            seed=request.sampling.seed or 7,
        )


class FakeStore(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """A registry in memory; an upload of the same bytes is recognised."""

    def __init__(self, *names: str) -> None:
        self.adapters = {name: self._adapter(name) for name in names}
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.metadata: list[adapter_store_pb2.PublishMetadata] = []
        self.lists: list[adapter_store_pb2.ListRequest] = []

    Watch: Any = unimplemented
    Download: Any = unimplemented

    def Publish(
        self,
        request_iterator: Iterator[adapter_store_pb2.PublishRequest],
        context: grpc.ServicerContext,
    ) -> adapter_store_pb2.PublishResponse:
        metadata = next(request_iterator).metadata
        self.metadata.append(metadata)
        files: dict[str, bytes] = {}
        for request in request_iterator:
            chunk = request.chunk
            files[chunk.file] = files.get(chunk.file, b"") + chunk.data
        if files["adapter_config.json"] == b"bad":
            fail(context, RpcError(Reason.ADAPTER_BASE_MISMATCH, "trained on another model"))
        known = self.uploads.get(metadata.name) == files
        if not metadata.dry_run:
            self.uploads[metadata.name] = files
            self.adapters.setdefault(metadata.name, self._adapter(metadata.name))
        bindings = [
            adapter_store_pb2.BoundModule(
                module=f"model.layers.{layer}.self_attn.q_proj", rank=16, scale=2.0
            )
            for layer in range(3)
        ]
        return adapter_store_pb2.PublishResponse(
            version=self._adapter(metadata.name).versions[0],
            bindings=bindings,
            already_published=known,
        )

    def Get(
        self, request: adapter_store_pb2.GetRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.GetResponse:
        adapter = self._find(request.adapter.partition("@")[0], context)
        return adapter_store_pb2.GetResponse(adapter=adapter, version=adapter.versions[-1])

    def List(
        self, request: adapter_store_pb2.ListRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.ListResponse:
        self.lists.append(adapter_store_pb2.ListRequest.FromString(request.SerializeToString()))
        names = sorted(
            name
            for name, adapter in self.adapters.items()
            if name.startswith(request.name_prefix)
            and (not request.digest or request.digest == adapter.versions[0].ref.digest)
        )
        first = int(request.page_token or 0)
        page = names[first : first + 2]  # small pages, so that reading one page is not enough
        following = str(first + 2) if first + 2 < len(names) else ""
        return adapter_store_pb2.ListResponse(
            adapters=[self.adapters[name] for name in page], next_page_token=following
        )

    def SetAlias(
        self, request: adapter_store_pb2.SetAliasRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.SetAliasResponse:
        adapter = self._find(request.name, context)
        if request.canary_percent:
            canary = adapter_store_pb2.Canary(
                version=request.version, percent=request.canary_percent
            )
            adapter.canaries[request.alias].CopyFrom(canary)
        else:
            adapter.previous_versions[request.alias] = adapter.aliases[request.alias]
            adapter.aliases[request.alias] = request.version
        return adapter_store_pb2.SetAliasResponse(adapter=adapter)

    def RollbackAlias(
        self, request: adapter_store_pb2.RollbackAliasRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.RollbackAliasResponse:
        adapter = self._find(request.name, context)
        if request.alias not in adapter.canaries:
            fail(context, RpcError(Reason.ALIAS_HAS_NO_PREVIOUS, "no way back", field="alias"))
        del adapter.canaries[request.alias]
        return adapter_store_pb2.RollbackAliasResponse(adapter=adapter)

    def SetVisibility(
        self, request: adapter_store_pb2.SetVisibilityRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.SetVisibilityResponse:
        adapter = self._find(request.name, context)
        adapter.tenants[:] = request.tenants
        return adapter_store_pb2.SetVisibilityResponse(adapter=adapter)

    def Pin(
        self, request: adapter_store_pb2.PinRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.PinResponse:
        name, _, selector = request.adapter.partition("@")
        adapter = self._find(name, context)
        pin = adapter.pins.add(selector=selector, reason=request.reason)
        pin.create_time.FromSeconds(1_700_000_000)
        return adapter_store_pb2.PinResponse(adapter=adapter)

    def Unpin(
        self, request: adapter_store_pb2.UnpinRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.UnpinResponse:
        name, _, selector = request.adapter.partition("@")
        adapter = self._find(name, context)
        kept = [pin for pin in adapter.pins if pin.selector != selector]
        if len(kept) == len(adapter.pins):
            fail(context, RpcError(Reason.PIN_NOT_FOUND, "not pinned", field="adapter"))
        del adapter.pins[:]
        adapter.pins.extend(kept)
        return adapter_store_pb2.UnpinResponse(adapter=adapter)

    def DeleteAlias(
        self, request: adapter_store_pb2.DeleteAliasRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.DeleteAliasResponse:
        adapter = self._find(request.name, context)
        if request.alias not in adapter.aliases:
            fail(context, RpcError(Reason.ALIAS_NOT_FOUND, "no such alias", field="alias"))
        del adapter.aliases[request.alias]
        return adapter_store_pb2.DeleteAliasResponse(adapter=adapter)

    def Delete(
        self, request: adapter_store_pb2.DeleteRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.DeleteResponse:
        self._find(request.adapter.partition("@")[0], context)
        del self.adapters[request.adapter.partition("@")[0]]
        return adapter_store_pb2.DeleteResponse()

    def _find(self, name: str, context: grpc.ServicerContext) -> adapter_store_pb2.Adapter:
        if name not in self.adapters:
            message = f"no adapter is called {name}"
            fail(context, RpcError(Reason.ADAPTER_NOT_FOUND, message, field="adapter"))
        return self.adapters[name]

    def _adapter(self, name: str) -> adapter_store_pb2.Adapter:
        version = adapter_store_pb2.AdapterVersion(
            ref=adapter_ref(name),
            target_modules=["q_proj", "v_proj"],
            dtype="BF16",
            base_model="org/base",
            parameters=1_843_200,
        )
        version.create_time.FromSeconds(1_700_000_000)
        return adapter_store_pb2.Adapter(
            name=name, versions=[version], aliases={"prod": 1}, revision=2
        )


@dataclass
class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """One attached worker and one waiting request."""

    worker_address: str = ""
    holding: tuple[str, ...] = ()  # workers whose requests never end
    unloads: list[scheduler_pb2.UnloadAdapterRequest] = field(default_factory=list)
    Submit: ClassVar[Any] = unimplemented
    Attach: ClassVar[Any] = unimplemented
    WatchResidency: ClassVar[Any] = unimplemented

    def GetState(
        self, request: scheduler_pb2.GetStateRequest, context: grpc.ServicerContext
    ) -> scheduler_pb2.GetStateResponse:
        worker = scheduler_pb2.WorkerState(
            worker_id="w-1",
            address=self.worker_address,
            attached=True,
            capacity=scheduler_pb2.WorkerCapacity(
                pool_blocks=100, block_bytes=2**20, max_requests=32
            ),
            status=scheduler_pb2.WorkerStatus(step_s=0.02),
        )
        return scheduler_pb2.GetStateResponse(
            scheduler_id="s-1",
            system="tuned",
            policy="chameleon",
            gateways=1,
            queues=[
                scheduler_pb2.QueueState(
                    name="small",
                    length=1,
                    oldest_s=0.5,
                    quota_tokens=4000,
                    used_tokens=1200,
                    size_limit=384,
                ),
                scheduler_pb2.QueueState(name="idle"),
            ],
            tenants=[
                scheduler_pb2.TenantState(
                    tenant="acme", held=4, running=2, tokens_per_s=250, available_tokens=-30
                )
            ],
            queued=[
                scheduler_pb2.QueuedRequest(
                    request_id="r-9", queue="small", waited_s=0.5, waits_for="memory"
                )
            ],
            workers=[worker] if self.worker_address else [],
        )

    def UnloadAdapter(
        self, request: scheduler_pb2.UnloadAdapterRequest, context: grpc.ServicerContext
    ) -> scheduler_pb2.UnloadAdapterResponse:
        self.unloads.append(request)
        return scheduler_pb2.UnloadAdapterResponse(
            freed_bytes=3_500_000, unloaded_workers=["w-1"], holding_workers=self.holding
        )


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Half of its pool in use, one adapter resident."""

    adapters: list[str] = field(default_factory=lambda: [DIGEST])
    StreamTokens: ClassVar[Any] = unimplemented
    Drain: ClassVar[Any] = unimplemented

    def GetState(
        self, request: worker_pb2.GetStateRequest, context: grpc.ServicerContext
    ) -> worker_pb2.GetStateResponse:
        return worker_pb2.GetStateResponse(
            worker_id="w-1",
            engine="simulated test",
            base_model="org/base",
            pool_blocks=100,
            kv_blocks=40,
            adapter_blocks=10,
            running_requests=3,
            loading_requests=1,
            output_tokens=12_345,
            adapters=[
                worker_pb2.AdapterState(
                    digest=digest,
                    tier=common_pb2.ADAPTER_TIER_DEVICE,
                    rank=16,
                    size_bytes=3_500_000,
                    users=2,
                    in_host=True,
                    pin_reason="first in demos",
                )
                for digest in self.adapters
            ],
            adapter_cache=worker_pb2.AdapterCacheCounts(hits=9, misses=3, downloaded_bytes=7),
        )
