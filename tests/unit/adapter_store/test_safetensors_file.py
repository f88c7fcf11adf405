import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.adapter_store.safetensors_file import (
    HEADER_BYTES_MAX,
    bits_of,
    float_values,
    largest,
    parse_tensors,
)
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import from_bits, safetensors_bytes, to_bits, with_header


def _entry(begin: int, end: int, *, shape: Any = None, dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 2], "data_offsets": [begin, end]}


def _refused(data: bytes) -> RpcError:
    with pytest.raises(RpcError) as caught:
        parse_tensors(memoryview(data))
    return caught.value


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_are_read_with_their_very_bits(dtype: str) -> None:
    first = to_bits(np.linspace(-3, 3, 12).reshape(3, 4), dtype)
    second = to_bits(np.linspace(1, 2, 5).reshape(1, 5), dtype)
    data = memoryview(safetensors_bytes({"b": first, "a": second}, dtype))
    tensors = parse_tensors(data)
    assert list(tensors) == ["b", "a"]
    assert np.array_equal(bits_of(data, tensors["b"]), first)
    assert np.array_equal(bits_of(data, tensors["a"]), second)


def test_the_order_of_the_header_need_not_be_that_of_the_data() -> None:
    data = with_header({"late": _entry(4, 8), "early": _entry(0, 4)}, bytes(8))
    assert set(parse_tensors(memoryview(data))) == {"late", "early"}


def test_an_empty_tensor_is_a_tensor() -> None:
    data = with_header({"full": _entry(0, 4), "empty": _entry(0, 0, shape=[0, 7])}, bytes(4))
    assert parse_tensors(memoryview(data))["empty"].shape == (0, 7)


HUGE = 2**48
BAD_FILES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "pickle": b"\x80\x04\x95" + bytes(100),
    "zip, as torch saves": b"PK\x03\x04" + bytes(100),
    "header over the limit": (HEADER_BYTES_MAX + 1).to_bytes(8, "little") + bytes(100),
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "length of 2^64 - 1": b"\xff" * 16,
    "not JSON": with_header(b"{nonsense}", b""),
    "not UTF-8": with_header(b'{"\xff": 1}', b""),
    "a list": with_header(b"[]", b""),
    "leading space": with_header(b' {"a":1}', b""),
    "NaN in the header": with_header(b'{"a": NaN}', b""),
    "nested deeply": with_header(b'{"a":' + b"[" * 100_000, b""),
    "integer of 5000 digits": with_header(b'{"a":' + b"1" * 5000 + b"}", b""),
    "duplicate key": with_header(
        b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
        b'"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}',
        bytes(2),
    ),
    "metadata of numbers": with_header({"__metadata__": {"a": 1}}, b""),
    "metadata that is no object": with_header({"__metadata__": []}, b""),
    "entry that is no object": with_header({"a": 1}, b""),
    "entry without shape": with_header({"a": {"dtype": "BF16", "data_offsets": [0, 2]}}, bytes(2)),
    "entry with more": with_header({"a": {**_entry(0, 2), "x": 1}}, bytes(2)),
    "overlapping ranges": with_header({"a": _entry(0, 4), "b": _entry(2, 6)}, bytes(6)),
    "the same range twice": with_header({"a": _entry(0, 4), "b": _entry(0, 4)}, bytes(4)),
    "a gap": with_header({"a": _entry(0, 2), "b": _entry(4, 6)}, bytes(6)),
    "bytes at the end": with_header({"a": _entry(0, 2)}, bytes(4)),
    "truncated data": with_header({"a": _entry(0, 8)}, bytes(6)),
    "backwards range": with_header({"a": _entry(4, 2, shape=[1])}, bytes(4)),
    "negative offset": with_header({"a": _entry(-2, 0, shape=[1])}, bytes(4)),
    "three offsets": with_header({"a": {**_entry(0, 2), "data_offsets": [0, 2, 2]}}, bytes(2)),
    "shape of another size": with_header({"a": _entry(0, 4, shape=[3])}, bytes(4)),
    "negative shape": with_header({"a": _entry(0, 4, shape=[-1, -2])}, bytes(4)),
    "boolean shape": with_header({"a": _entry(0, 2, shape=[True])}, bytes(2)),
    "fractional shape": with_header({"a": _entry(0, 2, shape=[1.0])}, bytes(2)),
    "shape whose product wraps 64 bits": with_header(
        {"a": _entry(0, 0, shape=[2**32, 2**32])}, b""
    ),
    "huge offsets": with_header({"a": _entry(HUGE, HUGE + 2, shape=[1])}, bytes(2)),
    "nine dimensions": with_header({"a": _entry(0, 2, shape=[1] * 9)}, bytes(2)),
    "unknown dtype": with_header({"a": _entry(0, 2, shape=[1], dtype="BF61")}, bytes(2)),
    "dtype that is a list": with_header({"a": _entry(0, 2, shape=[1], dtype=["BF16"])}, bytes(2)),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_malformed_file_is_refused(what: str) -> None:
    error = _refused(BAD_FILES[what])
    assert error.reason is Reason.ADAPTER_INVALID
    assert error.context.field == "adapter_model.safetensors"
    error.to_status()  # the message can travel, whatever the file held


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "F64", "U8", "BOOL"])
def test_a_dtype_that_is_not_served_is_refused_by_name(dtype: str) -> None:
    error = _refused(with_header({"a": _entry(0, 8, shape=[1], dtype=dtype)}, bytes(8)))
    assert error.reason is Reason.ADAPTER_UNSUPPORTED
    assert dtype in error.message


def test_a_name_that_has_no_utf8_form_can_be_reported() -> None:
    header = b'{"\\ud800":{"dtype":"BF16","shape":[9],"data_offsets":[0,2]}}'
    assert "ud800" in _refused(with_header(header, bytes(2))).to_status().message


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_bits_stand_for_their_numbers(dtype: str) -> None:
    values = np.array([[0.0, -0.0, 1.5], [-2.0, 2.0**-14, 65504.0 if dtype == "F16" else 2.0**127]])
    assert np.array_equal(float_values(to_bits(values, dtype), dtype), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_largest_magnitude_tells_numbers_from_infinity_and_nan(dtype: str) -> None:
    values = np.array([[0.0, -0.0], [1.0, -3.0], [2.0**-14, 0.0], [np.inf, 1.0], [1.0, -np.inf]])
    bits = to_bits(values, dtype)
    assert largest(bits, dtype, axis=1).tolist() == [0.0, 3.0, 2.0**-14, np.inf, np.inf]
    assert largest(bits[:3], dtype, axis=0).tolist() == [1.0, 3.0]
    everything_set = np.array([[-1, 0]], dtype=np.int64).astype(bits.dtype)
    assert np.isnan(from_bits(everything_set[:, :1], dtype)).all()
    assert np.isnan(largest(everything_set, dtype, axis=1)).all()
    assert np.isnan(largest(np.vstack([everything_set, bits[3:4]]), dtype, axis=0)[0])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_give_the_typed_error_or_tensors(data: bytes) -> None:
    try:
        parse_tensors(memoryview(data))
    except RpcError as error:
        error.to_status()


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**65)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["BF16", "F32", "I8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
_size = st.integers(0, 12) | _json
_entry_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F16", "F32", "I8"]) | _json,
        "shape": st.lists(_size, max_size=3) | _json,
        "data_offsets": st.lists(_size, min_size=1, max_size=3) | _json,
    }
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), _entry_like | _json, max_size=3), st.binary(max_size=12)
)
def test_random_headers_give_the_typed_error_or_tensors_that_cover_the_data(
    header: dict[str, Any], payload: bytes
) -> None:
    data = memoryview(with_header(json.dumps(header).encode(), payload))
    try:
        tensors = parse_tensors(data)
    except RpcError as error:
        error.to_status()
        return
    assert sum(tensor.size_bytes for tensor in tensors.values()) == len(payload)
    for tensor in tensors.values():
        assert bits_of(data, tensor).nbytes == tensor.size_bytes
