"""Server reflection as grpcurl uses it: descriptors from the server, no generated code."""

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc


class Reflected:
    """What a server says about itself; `pool` has what was loaded."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._known: set[str] = set()
        self.pool: Any = descriptor_pool.DescriptorPool()

    def services(self) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="*")
        return [service.name for service in self._ask(request).list_services_response.service]

    def load(self, symbol: str) -> None:
        self._add(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))

    def _add(self, request: reflection_pb2.ServerReflectionRequest) -> None:
        """Add the files of the answer, after those that they import."""
        for data in self._ask(request).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for name in file.dependency:
                self._add(reflection_pb2.ServerReflectionRequest(file_by_filename=name))
            self.pool.Add(file)

    def _ask(self, request: reflection_pb2.ServerReflectionRequest) -> Any:
        def requests() -> Iterator[reflection_pb2.ServerReflectionRequest]:
            yield request

        (response,) = self._stub.ServerReflectionInfo(requests(), timeout=10)
        return response
