"""The parts of a download as they are on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.worker.blob_parts import read_part


@given(st.integers(0, 2**63 - 1), st.binary(max_size=2000), st.integers(0, 2**63 - 1))
def test_a_part_is_what_the_generated_parser_reads(offset: int, data: bytes, total: int) -> None:
    message = pb.DownloadResponse(offset=offset, data=data, total_bytes=total)
    part = read_part(message.SerializeToString())
    assert (part.offset, bytes(part.data), part.total_bytes) == (offset, data, total)


def test_unknown_fields_are_passed_over() -> None:
    known = pb.DownloadResponse(offset=3, data=b"abc", total_bytes=6).SerializeToString()
    unknown = b"\x28\x05" + b"\x32\x02hi" + b"\x39" + bytes(8) + b"\x45" + bytes(4)
    part = read_part(unknown + known + unknown)
    assert (part.offset, bytes(part.data), part.total_bytes) == (3, b"abc", 6)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(message: bytes) -> None:
    try:
        part = read_part(message)
    except ValueError:
        return
    assert len(part.data) <= len(message)


@pytest.mark.parametrize("message", [b"\x12\x05abc", b"\x08", b"\x0b", b"\x08" + b"\xff" * 11])
def test_what_is_cut_short_or_of_no_known_type_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut short|without an end|wire type"):
        read_part(message)
