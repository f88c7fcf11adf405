import hashlib
import json
import struct
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.adapter_container import (
    ALIGNMENT,
    HEADER_BYTES_MAX,
    MAGIC,
    ContainerError,
    LoraRows,
    digest_of,
    encode,
    header_size,
    read_header,
)


def _rows(layer: int, module: str, rank: int, *, seed: int = 0) -> LoraRows:
    generator = np.random.default_rng(seed)
    return LoraRows(
        layer=layer,
        module=module,
        rank=rank,
        scale=2.0,
        in_features=16,
        out_features=24,
        a_rows=generator.bytes(rank * 16 * 2),
        bt_rows=generator.bytes(rank * 24 * 2),
    )


ROWS = [_rows(0, "q_proj", 4), _rows(0, "v_proj", 8, seed=1), _rows(2, "q_proj", 1, seed=2)]


def test_a_blob_gives_back_what_went_in() -> None:
    blob = encode(ROWS, dtype="BF16")
    header = read_header(blob)
    assert header.payload_offset % ALIGNMENT == 0
    assert header.total_bytes == len(blob)
    assert header.rank == 8
    for rows, entry in zip(ROWS, header.modules, strict=True):
        start = header.payload_offset + entry.offset
        middle = start + entry.a_bytes("BF16")
        assert blob[start:middle] == rows.a_rows
        assert blob[middle : middle + entry.b_bytes("BF16")] == rows.bt_rows


def test_each_layer_is_one_range_with_its_digest() -> None:
    blob = encode(ROWS, dtype="BF16")
    header = read_header(blob)
    assert [chunk.layer for chunk in header.layers] == [0, 2]
    end = 0
    for chunk in header.layers:
        assert chunk.offset == end
        end += chunk.size_bytes
        start = header.payload_offset + chunk.offset
        layer_bytes = blob[start : start + chunk.size_bytes]
        assert hashlib.sha256(layer_bytes).hexdigest() == chunk.sha256
    assert end == header.payload_bytes


def test_equal_weights_have_equal_digests_and_others_have_not() -> None:
    assert digest_of(encode(ROWS, dtype="BF16")) == digest_of(encode(list(ROWS), dtype="BF16"))
    other = [*ROWS[:2], _rows(2, "q_proj", 1, seed=3)]
    assert digest_of(encode(ROWS, dtype="BF16")) != digest_of(encode(other, dtype="BF16"))


def test_layers_out_of_order_are_refused() -> None:
    with pytest.raises(ContainerError):
        encode([ROWS[2], ROWS[0]], dtype="BF16")


def _blob(fields: Any) -> bytes:
    raw = json.dumps(fields).encode()
    return struct.pack("<8sI", MAGIC, len(raw)) + raw


def _fields(**changes: Any) -> dict[str, Any]:
    header = read_header(encode(ROWS, dtype="BF16"))
    return {
        "dtype": header.dtype,
        "modules": [asdict(entry) for entry in header.modules],
        "layers": [asdict(chunk) for chunk in header.layers],
        "payload_bytes": header.payload_bytes,
        **changes,
    }


def _entry(**changes: Any) -> dict[str, Any]:
    return {**asdict(read_header(encode(ROWS, dtype="BF16")).modules[0]), **changes}


def _with_first(**changes: Any) -> dict[str, Any]:
    """The fields of a right header, but for the first entry."""
    fields = _fields()
    fields["modules"][0] |= changes
    return fields


BAD = {
    "empty": b"",
    "short": MAGIC,
    "another file": b"PK\x03\x04" + bytes(100),
    "huge header": struct.pack("<8sI", MAGIC, HEADER_BYTES_MAX + 1),
    "cut header": encode(ROWS, dtype="BF16")[:100],
    "not JSON": struct.pack("<8sI", MAGIC, 4) + b"nope",
    "a list": _blob([]),
    "no dtype": _blob({k: v for k, v in _fields().items() if k != "dtype"}),
    "unknown dtype": _blob(_fields(dtype="I8")),
    "dtype of another size": _blob(_fields(dtype="F32")),
    "no modules": _blob(_fields(modules=[], payload_bytes=0)),
    "rank 0": _blob(_with_first(rank=0)),
    "gap": _blob(_with_first(offset=256)),
    "not covered": _blob(_fields(modules=[_entry()])),
    "unknown field": _blob(_with_first(extra=1)),
    "text as rank": _blob(_with_first(rank="4")),
    "fractional rank": _blob(_with_first(rank=4.0)),
    "scale over every float": _blob(_with_first(scale=10**400)),
    "infinite scale": _blob(_with_first(scale=float("inf"))),
    "scale that is true": _blob(_with_first(scale=True)),
    "layer before the embedding": _blob(_with_first(layer=-2)),
    "layer that is false": _blob(_with_first(layer=False)),
    "module that is a number": _blob(_with_first(module=1)),
    "scale that is no number": _blob(_with_first(scale=float("nan"))),
    "the same module twice": _blob(
        _fields(
            modules=[_entry(), _entry(offset=320)],
            layers=[{"layer": 0, "offset": 0, "size_bytes": 640, "sha256": "0" * 64}],
            payload_bytes=640,
        )
    ),
    "fractional size of the payload": _blob(
        _fields(payload_bytes=float(_fields()["payload_bytes"]))
    ),
    "fractional offset of a layer": _blob(
        _fields(
            layers=[{**chunk, "offset": float(chunk["offset"])} for chunk in _fields()["layers"]]
        )
    ),
    "number as a layer's digest": _blob(
        _fields(layers=[{**chunk, "sha256": 1} for chunk in _fields()["layers"]])
    ),
    "module that is a list": _blob(_fields(modules=[[]])),
    "dtype that is a list": _blob(_fields(dtype=["BF16"])),
    "layers beyond the payload": _blob(
        _fields(layers=[{"layer": 0, "offset": 0, "size_bytes": 10**9, "sha256": "0" * 64}])
    ),
    "nested deeply": struct.pack("<8sI", MAGIC, 200_000) + b"[" * 200_000,
}


def test_what_is_made_wrong_below_is_right() -> None:
    assert read_header(_blob(_with_first(scale=1.5))).modules[0].scale == 1.5


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_blob_is_refused(what: str) -> None:
    with pytest.raises(ContainerError):
        read_header(BAD[what])


def test_a_refusal_is_short_whatever_the_header_holds() -> None:
    for entry in (_entry(module="x" * 10**6, rank=0), _entry(**{"y" * 10**6: 1})):
        with pytest.raises(ContainerError) as caught:
            read_header(_blob(_fields(modules=[entry])))
        assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ContainerError):
        read_header(data)
    with pytest.raises(ContainerError):
        read_header(struct.pack("<8sI", MAGIC, len(data)) + data)


_value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_any = st.recursive(
    _value,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.sampled_from(["dtype", "modules", "layers", "payload_bytes"]),
    _any,
    st.sampled_from(["layer", "module", "rank", "scale", "in_features", "out_features", "offset"]),
    _any,
)
def test_a_header_with_a_wrong_value_is_read_or_refused(
    field: str, value: Any, entry_field: str, entry_value: Any
) -> None:
    for fields in (
        _fields(**{field: value}),
        _fields(modules=[_entry(**{entry_field: entry_value})]),
    ):
        try:
            header = read_header(_blob(fields))
        except ContainerError:
            continue
        assert header.total_bytes >= header.payload_offset


def test_the_header_can_be_read_from_the_front_alone() -> None:
    blob = encode(ROWS, dtype="BF16")
    assert read_header(memoryview(blob)[: 12 + header_size(blob)]) == read_header(blob)


def test_the_digest_of_half_a_header_is_refused() -> None:
    blob = encode(ROWS, dtype="BF16")
    front_bytes = read_header(blob).payload_offset
    assert digest_of(blob[:front_bytes]) == digest_of(blob)
    with pytest.raises(ContainerError):
        digest_of(blob[: front_bytes - 1])
