"""What the protos promise beyond what buf can check."""

from google.protobuf.descriptor import Descriptor

from calumma.gateway.v1 import gateway_pb2


def test_generate_and_generate_stream_take_the_same_fields() -> None:
    unary = gateway_pb2.GenerateRequest.DESCRIPTOR
    stream = gateway_pb2.GenerateStreamRequest.DESCRIPTOR

    def shape(descriptor: Descriptor) -> dict[str, object]:
        return {
            field.name: (field.number, field.type, field.is_repeated, field.has_presence)
            for field in descriptor.fields
        }

    assert shape(unary) == shape(stream)


def test_a_unary_request_reads_as_a_stream_request() -> None:
    request = gateway_pb2.GenerateRequest(prompt="hello", adapter="a@1", priority=3)
    request.stopping.stop.append("x")

    stream = gateway_pb2.GenerateStreamRequest.FromString(request.SerializeToString())

    assert stream.SerializeToString() == request.SerializeToString()
