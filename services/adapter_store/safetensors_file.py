"""A strict reader of safetensors, the only weight format that is accepted.

A file is u64 little-endian length of the header · JSON header · data. The header maps each tensor
to dtype, shape and the range of its bytes. The ranges must cover the data exactly, without gap or
overlap, so that nothing is read twice and nothing travels along unseen. Every size is checked
before anything is read from it.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.adapter_store.refusals import invalid, shown, unsupported
from services.adapter_store.strict_json import parse_object
from services.common.adapter_container import DTYPE_BYTES

FILE: Final = "adapter_model.safetensors"
HEADER_BYTES_MAX: Final = 10 * 2**20
DIMENSIONS_MAX: Final = 8
_LENGTH_BYTES: Final = 8
_OTHER_DTYPES: Final = re.compile(r"BOOL|[UI](8|16|32|64)|F(4|6|8)(_\w+)?|F64|C64", re.ASCII)

Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `offset`: from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def parse_tensors(data: memoryview) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises ADAPTER_INVALID and ADAPTER_UNSUPPORTED."""
    header_bytes = _header_bytes(data)
    start = _LENGTH_BYTES + header_bytes
    raw = bytes(data[_LENGTH_BYTES:start])
    if not raw.startswith(b"{"):
        raise invalid(f"{FILE}: the header does not begin with an object", field=FILE)
    header = parse_object(raw, file=FILE)
    _check_metadata(header.pop("__metadata__", {}))
    tensors = [_tensor(name, fields, start=start) for name, fields in header.items()]
    # Empty tensors share their offset with the next one.
    end = start
    for tensor in sorted(tensors, key=lambda item: (item.offset, item.size_bytes)):
        if tensor.offset != end:
            what = "overlap" if tensor.offset < end else "leave a gap"
            raise invalid(f"{FILE}: ranges {what} at {shown(tensor.name)}", field=FILE)
        end += tensor.size_bytes
    if end != len(data):
        raise invalid(
            f"{FILE}: the tensors take {end} bytes and the file has {len(data)}", field=FILE
        )
    return {tensor.name: tensor for tensor in tensors}


def bits_of(data: memoryview, tensor: Tensor) -> Bits:
    """The elements as unsigned integers of their width, without a copy."""
    width: type[np.unsignedinteger[Any]] = np.uint32 if tensor.dtype == "F32" else np.uint16
    count = math.prod(tensor.shape)
    return np.frombuffer(data, dtype=width, count=count, offset=tensor.offset).reshape(tensor.shape)


def largest(bits: Bits, dtype: str, *, axis: int) -> npt.NDArray[np.float32]:
    """The largest magnitude along `axis`: infinite or NaN where one of the elements is."""
    magnitude = bits.dtype.type(2 ** (8 * DTYPE_BYTES[dtype] - 1) - 1)
    # Magnitudes are ordered as their bits are, infinity and then NaN last.
    top: Bits = (bits & magnitude).max(axis=axis)
    return float_values(top, dtype)


def float_values(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """The numbers that the elements stand for; every one of them has a float32."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _header_bytes(data: memoryview) -> int:
    if len(data) < _LENGTH_BYTES:
        raise invalid(f"{FILE}: only {len(data)} bytes long", field=FILE)
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if header_bytes > HEADER_BYTES_MAX:
        raise invalid(
            f"{FILE}: not a safetensors file, or its header is over {HEADER_BYTES_MAX} bytes",
            field=FILE,
        )
    if _LENGTH_BYTES + header_bytes > len(data):
        raise invalid(f"{FILE}: the file ends within its header", field=FILE)
    return header_bytes


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise invalid(f"{FILE}: __metadata__ must map strings to strings", field=FILE)


def _tensor(name: str, fields: Any, *, start: int) -> Tensor:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise invalid(f"{FILE}: malformed entry {shown(name)}", field=FILE)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        refuse = unsupported if _OTHER_DTYPES.fullmatch(str(dtype)) else invalid
        raise refuse(
            f"{shown(name)} has dtype {shown(dtype)}; served are {', '.join(DTYPE_BYTES)}",
            field=FILE,
        )
    if not _are_sizes(shape) or len(shape) > DIMENSIONS_MAX:
        raise invalid(f"{FILE}: bad shape of {shown(name)}", field=FILE)
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise invalid(f"{FILE}: bad data_offsets of {shown(name)}", field=FILE)
    tensor = Tensor(name, dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != tensor.size_bytes:
        raise invalid(
            f"{FILE}: {shown(name)} of shape {shown(shape)} has a range of another size", field=FILE
        )
    return tensor


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^48; `True` is no integer here."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= 2**48 for value in values
    )
