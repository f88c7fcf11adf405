"""The peer of `bench stream`: a plain gRPC server that streams bytes which it has in memory.

No interceptor, no disk, no checks: as fast as this message can go from Python to Python. Prints
its address and runs until its standard input ends.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import uvloop

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.common.memory import keep_freed_memory

CHUNK_BYTES: Final = 2**20


async def _serve(size_bytes: int) -> None:
    chunks = [
        os.urandom(min(CHUNK_BYTES, size_bytes - start))
        for start in range(0, size_bytes, CHUNK_BYTES)
    ]

    async def download(_: pb.DownloadRequest, __: Any) -> AsyncIterator[pb.DownloadResponse]:
        offset = 0
        for data in chunks:
            yield pb.DownloadResponse(offset=offset, data=data, total_bytes=size_bytes)
            offset += len(data)

    server = grpc.aio.server(options=[("grpc.max_send_message_length", 8 * 2**20)])
    handler = grpc.unary_stream_rpc_method_handler(
        download,
        request_deserializer=pb.DownloadRequest.FromString,
        response_serializer=pb.DownloadResponse.SerializeToString,
    )
    name = pb.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"Download": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    keep_freed_memory()
    uvloop.run(_serve(int(sys.argv[1])))
