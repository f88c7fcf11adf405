"""InferenceService: each RPC opens a request, reads its tokens and serialises them.

The first message of a stream, and with it the initial metadata, goes out when the request is
placed at a worker or has its first token, whichever is first: until then a failure is a plain
status, which clients' retry policies may act on.
"""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway import wire
from services.gateway.generations import Generations

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(gateway_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self._token_text = generations.tokenizer.token_text

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: _Context
    ) -> gateway_pb2.GenerateResponse:
        """Return the whole completion."""
        async with self._generations.open(
            request, time_left_s=context.time_remaining(), streaming=False
        ) as stream:
            await stream.ended()
            return wire.response(stream.request, stream.request.take(), self._token_text)

    async def GenerateStream(
        self, request: gateway_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncIterator[gateway_pb2.GenerateStreamResponse]:
        """Return the completion piece by piece."""
        async with self._generations.open(
            request, time_left_s=context.time_remaining(), streaming=True
        ) as stream:
            await stream.begun()
            yield wire.started(stream.request)
            async for piece in stream.pieces():
                yield wire.chunk(piece, self._token_text)
            yield wire.finished(stream.request)
