"""The one path of every request, whichever API it came in by: check, admit, submit, end.

`open` is a block in which a request lives. Entering it does everything that can refuse a request
before the scheduler sees it; leaving it cancels what has not ended, teaches the predictor and
records what happened.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, assert_never

from services.common.errors import Reason, RpcError
from services.gateway.config import GatewaySettings
from services.gateway.observation import Instruments, Observation
from services.gateway.parse import GenerateMessage, Limits, output_limit, parse
from services.gateway.predictor import LengthPredictor
from services.gateway.registry import Registry
from services.gateway.requests import Admitted, OwnedRequest, deadline_error
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.streams import RequestStreams, TokenStream, gateway_draining
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import (
    AdapterName,
    AdapterRef,
    ChatPrompt,
    Finish,
    GenerateSpec,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

INLINE_PROMPT_BYTES: Final = 4096  # tokenised on the event loop: under a millisecond
_SEED_BITS: Final = 53  # exact in every client's number type
# A client's own timer hides why its request ended; ending a little earlier lets the reason arrive.
# gRPC rounds a timeout up by as much as this fraction when it sends it.
_DEADLINE_ROUNDING: Final = 0.01
_DEADLINE_MARGIN_S: Final = 0.02


class Generations:
    """Admits requests and runs them. `drain` refuses new ones and waits for the rest."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        limits: Callable[[], Limits],
        tokenizer: ModelTokenizer,
        registry: Registry,
        scheduler: SchedulerLink,
        streams: RequestStreams,
        instruments: Instruments,
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._limits = limits
        self._registry = registry
        self._scheduler = scheduler
        self._streams = streams
        self._instruments = instruments
        self._predictor = LengthPredictor()
        self._executor = ThreadPoolExecutor(settings.tokenizer_threads, "tokenizer")
        self._is_draining = False
        self._left = asyncio.Event()

    @contextlib.asynccontextmanager
    async def open(
        self, message: GenerateMessage, *, time_left_s: float | None, streaming: bool
    ) -> AsyncGenerator[TokenStream]:
        """Run a request for as long as the block lasts. Raises RpcError."""
        received_s = time.monotonic()
        deadline_s = received_s + self._time_limit_s(time_left_s)
        self._check_draining()
        self._streams.check_room()
        limits = self._limits()
        spec = parse(message, limits)
        client_id = spec.request_id or f"req-{secrets.token_hex(8)}"
        with self._streams.claim(client_id):
            observation = Observation(
                spec, client_id=client_id, instruments=self._instruments, streaming=streaming
            )
            request: OwnedRequest | None = None
            failure: BaseException | None = None
            try:
                request = await self._admit(
                    spec,
                    limits,
                    client_id=client_id,
                    received_s=received_s,
                    deadline_s=deadline_s,
                    traceparent=observation.traceparent,
                )
                with self._streams.open(request) as stream:
                    yield stream
            except BaseException as error:
                failure = error
                raise
            finally:
                self._learn(request)
                observation.end(request, failure)
                self._left.set()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests; return when none is in flight, or end them when time is over."""
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                while len(self._streams) > 0:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            self._streams.end_all()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _admit(
        self,
        spec: GenerateSpec,
        limits: Limits,
        *,
        client_id: str,
        received_s: float,
        deadline_s: float,
        traceparent: str,
    ) -> OwnedRequest:
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                adapter = await self._resolve(spec.adapter, client_id)
                prompt_token_ids = await self._encode(spec.prompt)
                stopping = output_limit(
                    spec.stopping, len(prompt_token_ids), limits, field=_field(spec.prompt)
                )
                await self._scheduler.wait_connected(self._settings.scheduler_wait_s)
        except TimeoutError:
            raise deadline_error("admission") from None
        assert stopping.max_tokens is not None
        digest = adapter.digest if adapter is not None else None
        prompt_tokens = len(prompt_token_ids)
        admitted = Admitted(
            client_id=client_id,
            wire_id=f"{client_id}.{secrets.token_hex(4)}",
            spec=spec,
            prompt_token_ids=prompt_token_ids,
            adapter=adapter,
            seed=_seed(spec),
            max_tokens=stopping.max_tokens,
            prediction=self._predictor.predict(digest, prompt_tokens, stopping.max_tokens),
            received_s=received_s,
            deadline_s=deadline_s,
            tenant=self._settings.tenant,
            traceparent=traceparent,
        )
        return OwnedRequest(admitted, self.tokenizer)

    async def _resolve(self, name: AdapterName | None, client_id: str) -> AdapterRef | None:
        """Once per request: the adapter that it is admitted with stays, whatever is published."""
        if name is None:
            return None
        tenant = self._settings.tenant
        return await self._registry.resolve(name, tenant=tenant, request_id=client_id)

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if _size(prompt) <= INLINE_PROMPT_BYTES:
            token_ids = self.tokenizer.encode(prompt)
        else:
            loop = asyncio.get_running_loop()
            token_ids = await loop.run_in_executor(self._executor, self.tokenizer.encode, prompt)
        if not token_ids:
            raise RpcError(Reason.PROMPT_EMPTY, "the prompt has no tokens", field=_field(prompt))
        return token_ids

    def _learn(self, request: OwnedRequest | None) -> None:
        if request is not None and request.finish in {Finish.STOP, Finish.LENGTH}:
            adapter = request.admitted.adapter
            self._predictor.learn(
                adapter.digest if adapter is not None else None,
                len(request.admitted.prompt_token_ids),
                len(request.output),
            )

    def _time_limit_s(self, time_left_s: float | None) -> float:
        if time_left_s is None:
            return self._settings.max_request_s
        margin_s = min(time_left_s * _DEADLINE_ROUNDING + _DEADLINE_MARGIN_S, time_left_s / 2)
        return min(time_left_s - margin_s, self._settings.max_request_s)

    def _check_draining(self) -> None:
        if self._is_draining:
            raise gateway_draining("admission")


def _size(prompt: Prompt) -> int:
    match prompt:
        case TextPrompt(text):
            return len(text)
        case ChatPrompt(messages):
            return sum(len(message.content) for message in messages)
        case TokenPrompt():
            return 0  # nothing to tokenise
        case _:
            assert_never(prompt)


def _field(prompt: Prompt) -> str:
    """Where the request has it."""
    match prompt:
        case TextPrompt():
            return "prompt"
        case TokenPrompt():
            return "token_ids.ids"
        case ChatPrompt():
            return "chat"
        case _:
            assert_never(prompt)


def _seed(spec: GenerateSpec) -> int:
    return secrets.randbits(_SEED_BITS) if spec.sampling.seed is None else spec.sampling.seed
