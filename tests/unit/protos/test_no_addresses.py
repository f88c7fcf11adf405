"""No client names a place: object storage and files are the operator's to choose."""

import re
from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from calumma.adapter_store.v1 import adapter_store_pb2
from calumma.gateway.v1 import gateway_pb2

_PLACE = re.compile(r"(^|_)(url|uri|path|bucket|endpoint|host|folder|dir|file)(s|$)")


def _fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from _fields(field.message_type, seen)


def test_no_request_has_a_field_for_a_place() -> None:
    found = {
        field.full_name
        for file in (adapter_store_pb2, gateway_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        for field in _fields(method.input_type, set())
        if _PLACE.search(field.name)
    }
    # One of two fixed names; anything else is refused (services/adapter_store/upload.py).
    assert found == {"calumma.adapter_store.v1.FileChunk.file"}
