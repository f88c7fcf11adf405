"""The worker-ready form of a LoRA adapter: one immutable blob, converted once at publish.

Owns the byte layout that the adapter store writes and the worker reads. A blob is

    magic "CALUMMA1" · u32 little-endian length of the header · JSON header · zeros · payload

The payload begins at a multiple of 256 bytes and is layer-major: for each layer, for each module,
the rows of A `[rank, in_features]` and then the rows of Bᵀ `[rank, out_features]`. Each rank is one
row in both, so adapters of different ranks stack without padding and a layer is one contiguous
range with a digest of its own.

`scale` stays in the header instead of being folded into B: B keeps the published bits, and the
worker folds in its own dtype. The blob is a pure function of weights and scales, so equal adapters
have equal digests.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

MAGIC: Final = b"CALUMMA1"
ALIGNMENT: Final = 256
HEADER_BYTES_MAX: Final = 10 * 2**20  # the largest header that a reader accepts
DTYPE_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4}
_PREFIX = struct.Struct("<8sI")


class ContainerError(ValueError):
    """The bytes are not a well-formed adapter blob."""


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One linear layer's LoRA pair. `offset`: bytes from the payload's start to the rows of A."""

    layer: int
    module: str  # "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    rank: int
    scale: float
    in_features: int
    out_features: int
    offset: int

    def a_bytes(self, dtype: str) -> int:
        return self.rank * self.in_features * DTYPE_BYTES[dtype]

    def b_bytes(self, dtype: str) -> int:
        return self.rank * self.out_features * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class LayerChunk:
    """The contiguous payload range of one layer."""

    layer: int
    offset: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ContainerHeader:
    """What a blob holds. `payload_offset` counts bytes from the blob's start."""

    dtype: str
    modules: tuple[ModuleEntry, ...]
    layers: tuple[LayerChunk, ...]
    payload_offset: int
    payload_bytes: int

    @property
    def rank(self) -> int:
        """Largest rank over all modules."""
        return max(entry.rank for entry in self.modules)

    @property
    def total_bytes(self) -> int:
        return self.payload_offset + self.payload_bytes


@dataclass(frozen=True, slots=True)
class LoraRows:
    """One module's weights as bytes: A row-major `[rank, in]` and Bᵀ row-major `[rank, out]`."""

    layer: int
    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_rows: bytes
    bt_rows: bytes


def encode(rows: Iterable[LoraRows], *, dtype: str) -> bytes:
    """Build the blob. `rows` must be grouped by ascending layer."""
    modules: list[ModuleEntry] = []
    payload = bytearray()
    for item in rows:
        modules.append(
            ModuleEntry(
                item.layer,
                item.module,
                item.rank,
                item.scale,
                item.in_features,
                item.out_features,
                len(payload),
            )
        )
        payload += item.a_rows
        payload += item.bt_rows
    header = json.dumps(
        {
            "dtype": dtype,
            "modules": [asdict(entry) for entry in modules],
            "layers": [asdict(chunk) for chunk in _layer_chunks(modules, payload)],
            "payload_bytes": len(payload),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    prefix = _PREFIX.pack(MAGIC, len(header)) + header
    return prefix + bytes(-len(prefix) % ALIGNMENT) + bytes(payload)


def read_header(blob: bytes | bytearray | memoryview) -> ContainerHeader:
    """Parse the front of a blob, the whole header at least. Raises ContainerError."""
    header_bytes = header_size(blob)
    if len(blob) < _PREFIX.size + header_bytes:
        raise ContainerError("the header is cut short")
    try:
        fields: dict[str, Any] = json.loads(bytes(blob[_PREFIX.size : _PREFIX.size + header_bytes]))
        header = ContainerHeader(
            dtype=fields["dtype"],
            modules=tuple(ModuleEntry(**entry) for entry in fields["modules"]),
            layers=tuple(LayerChunk(**chunk) for chunk in fields["layers"]),
            payload_offset=_aligned(_PREFIX.size + header_bytes),
            payload_bytes=fields["payload_bytes"],
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ContainerError(f"the header is malformed: {error}") from error
    _check(header)
    return header


def header_size(front: bytes | bytearray | memoryview) -> int:
    """Bytes of JSON that follow the 12-byte prefix. Raises ContainerError."""
    if len(front) < _PREFIX.size:
        raise ContainerError("shorter than the prefix")
    magic, header_bytes = _PREFIX.unpack(bytes(front[: _PREFIX.size]))
    if magic != MAGIC:
        raise ContainerError("not an adapter blob")
    if header_bytes > HEADER_BYTES_MAX:
        raise ContainerError(
            f"header of {header_bytes} bytes is over the limit of {HEADER_BYTES_MAX}"
        )
    return int(header_bytes)


def digest_of(blob: bytes | bytearray | memoryview) -> str:
    """Identity of an adapter: "sha256:" and 64 hex digits over the whole blob."""
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _aligned(size: int) -> int:
    return size + (-size % ALIGNMENT)


def _layer_chunks(modules: Sequence[ModuleEntry], payload: bytearray) -> list[LayerChunk]:
    return [
        LayerChunk(layer, start, end - start, hashlib.sha256(payload[start:end]).hexdigest())
        for layer, start, end in _layer_ranges(modules, len(payload))
    ]


def _layer_ranges(
    modules: Sequence[ModuleEntry], payload_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Layer, start and end of each layer's part of the payload."""
    starts: dict[int, int] = {}
    for entry in modules:
        if starts and entry.layer < next(reversed(starts)):
            raise ContainerError("modules are not grouped by ascending layer")
        starts.setdefault(entry.layer, entry.offset)
    ends = [*list(starts.values())[1:], payload_bytes]
    for (layer, start), end in zip(starts.items(), ends, strict=True):
        yield layer, start, end


def _check(header: ContainerHeader) -> None:
    if type(header.dtype) is not str or header.dtype not in DTYPE_BYTES:
        raise ContainerError(f"unknown dtype {header.dtype!r}")
    if not header.modules:
        raise ContainerError("no modules")
    end = 0
    for entry in header.modules:
        if not _is_entry(entry) or entry.offset != end:
            raise ContainerError(f"bad entry for layer {entry.layer!r} {entry.module!r}")
        end += entry.a_bytes(header.dtype) + entry.b_bytes(header.dtype)
    if end != header.payload_bytes:
        raise ContainerError("entries do not cover the payload")
    ranges = [(chunk.layer, chunk.offset, chunk.size_bytes) for chunk in header.layers]
    if ranges != [
        (n, start, stop - start) for n, start, stop in _layer_ranges(header.modules, end)
    ]:
        raise ContainerError("layers are not those of the entries")


def _is_entry(entry: ModuleEntry) -> bool:
    """Whether the values, which come from JSON, are of their types and in range."""
    counts = (entry.rank, entry.in_features, entry.out_features)
    return (
        all(type(number) is int for number in (*counts, entry.layer, entry.offset))
        and min(counts) >= 1
        and entry.layer >= 0
        and type(entry.module) is str
        and type(entry.scale) in (int, float)
        and math.isfinite(entry.scale)
    )
