"""Streams one answer: `generate_stream.py HOST:PORT ADAPTER PROMPT` ("" is the base model)."""

import sys
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc


def main(address: str, adapter: str, prompt: str) -> None:
    request = gateway_pb2.GenerateStreamRequest(adapter=adapter)
    request.chat.messages.add(role="user", content=prompt)
    request.stopping.max_tokens = 256
    with grpc.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        for response in stub.GenerateStream(request, timeout=60):
            if response.HasField("chunk"):
                print(response.chunk.text, end="", flush=True)
            if response.HasField("finished"):
                print()
                print(response.finished.usage.output_tokens, "tokens", file=sys.stderr)


def reason(error: Any) -> str:
    """The stable reason of a failed call, for example ADAPTER_NOT_FOUND."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    unpacked = [detail for detail in status.details if detail.Unpack(info)] if status else []
    return f"{info.reason} {dict(info.metadata)}" if unpacked else error.code().name


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except grpc.RpcError as failure:
        sys.exit(f"{failure.details()}\n{reason(failure)}")
