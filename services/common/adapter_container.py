"""The worker-ready form of a LoRA adapter: one immutable blob, converted once at publish.

Owns the byte layout that the adapter store writes and the worker reads. A blob is

    magic "CALUMMA1" · u32 little-endian length of the header · JSON header · zeros · payload

The payload begins at a multiple of 256 bytes and is layer-major: for each layer, for each module,
the rows of A `[rank, in_features]` and then the rows of Bᵀ `[rank, out_features]`. Each rank is one
row in both, so adapters of different ranks stack without padding and a layer is one contiguous
range with a digest of its own. In front of layer 0 come the rows of the embedding, as layer -1, and
behind the last layer those of the output head, as the layer after it: the order of a forward pass.

An adapter's digest is the SHA-256 of what precedes the payload. That holds the SHA-256 of every
layer, so it stands for all bytes, and each layer can be trusted as soon as it is there:
`BlobVerifier` says how far a blob that is still arriving may be used.

`scale` stays in the header instead of being folded into B: B keeps the published bits, and the
worker folds in its own dtype. The blob is a pure function of weights and scales, so equal adapters
have equal digests.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from reprlib import repr as shortened
from typing import Any, Final

MAGIC: Final = b"CALUMMA1"
ALIGNMENT: Final = 256
HEADER_BYTES_MAX: Final = 10 * 2**20  # the largest header that a reader accepts
EMBEDDING: Final = "embed_tokens"
EMBEDDING_LAYER: Final = -1  # where the rows of the embedding lie
HEAD: Final = "lm_head"  # its rows lie in the layer after the model's last one
DTYPE_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4}
_PREFIX = struct.Struct("<8sI")
_SCALE_MAX: Final = sys.float_info.max
_SHOWN_CHARACTERS_MAX: Final = 120


class ContainerError(ValueError):
    """The bytes are not a well-formed adapter blob."""


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One linear layer's LoRA pair. `offset`: bytes from the payload's start to the rows of A.

    `in_features` of the embedding is the vocabulary, of which a token takes one column of A.
    """

    layer: int
    module: str  # "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", …
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

    def layers_within(self, blob_bytes: int, *, num_layers: int) -> int:
        """How many layers of a model of `num_layers` the first `blob_bytes` have all rows for.

        All of them are not enough for the output: the head's rows may be missing.
        """
        for chunk in self.layers:
            if self.payload_offset + chunk.offset + chunk.size_bytes > blob_bytes:
                return min(max(0, chunk.layer), num_layers)
        return num_layers


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
            "layers": [asdict(chunk) for chunk in _layer_chunks(modules, memoryview(payload))],
            "payload_bytes": len(payload),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    prefix = _PREFIX.pack(MAGIC, len(header)) + header
    return b"".join((prefix, bytes(-len(prefix) % ALIGNMENT), payload))


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
        raise ContainerError(
            f"the header is malformed: {str(error)[:_SHOWN_CHARACTERS_MAX]}"
        ) from error
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
    """Identity of an adapter: "sha256:" and 64 hex digits. Raises ContainerError.

    Of what precedes the payload; that the payload is the one it speaks of is `verify`'s matter.
    """
    front_bytes = _aligned(_PREFIX.size + header_size(blob))
    if len(blob) < front_bytes:
        raise ContainerError("the header is cut short")
    return _digest(memoryview(blob)[:front_bytes])


def verify(blob: bytes | bytearray | memoryview, digest: str) -> ContainerHeader:
    """Check a whole blob. Raises ContainerError."""
    verifier = BlobVerifier(digest)
    verifier.feed(blob)
    if verifier.header is None or not verifier.is_complete:
        raise ContainerError(f"the blob ends after {len(blob)} bytes")
    return verifier.header


class BlobVerifier:
    """Checks a blob while it arrives: the front against the digest, each layer against the front.

    Fed with consecutive parts of any size. Nothing past `verified_bytes` may be used or handed on.
    """

    def __init__(self, digest: str) -> None:
        self.header: ContainerHeader | None = None  # once the front is here and right
        self.verified_bytes = 0
        self._digest = digest
        self._front = bytearray()
        self._fed_bytes = 0
        self._layer = 0  # index of the layer that is coming
        self._hash = hashlib.sha256()

    @property
    def is_complete(self) -> bool:
        """True once all of it is here and right."""
        return self.header is not None and self.verified_bytes == self.header.total_bytes

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next part. Raises ContainerError at the first thing that is wrong."""
        view = memoryview(data)
        if self.header is None:
            view = self._feed_front(view)
        if self.header is not None and view:
            self._feed_payload(self.header, view)

    def _feed_front(self, view: memoryview) -> memoryview:
        """Take what belongs to the front; return the rest."""
        while len(self._front) < (wanted_bytes := self._front_bytes()):
            taken = view[: wanted_bytes - len(self._front)]
            if not taken:
                return view
            self._front += taken
            view = view[len(taken) :]
        digest = _digest(self._front)
        if digest != self._digest:
            raise ContainerError(f"the header has the digest {digest}, not {self._digest}")
        self.header = read_header(self._front)
        self.verified_bytes = self._fed_bytes = len(self._front)
        self._front = bytearray()
        return view

    def _front_bytes(self) -> int:
        """What must be here to go on: the prefix, then all that precedes the payload."""
        if len(self._front) < _PREFIX.size:
            return _PREFIX.size
        return _aligned(_PREFIX.size + header_size(self._front))

    def _feed_payload(self, header: ContainerHeader, view: memoryview) -> None:
        while view:
            if self._layer == len(header.layers):
                raise ContainerError("there are bytes behind the last layer")
            chunk = header.layers[self._layer]
            end = header.payload_offset + chunk.offset + chunk.size_bytes
            taken = view[: end - self._fed_bytes]
            self._hash.update(taken)
            self._fed_bytes += len(taken)
            view = view[len(taken) :]
            if self._fed_bytes == end:
                if self._hash.hexdigest() != chunk.sha256:
                    raise ContainerError(f"layer {chunk.layer} does not have its digest")
                self.verified_bytes = end
                self._layer += 1
                self._hash = hashlib.sha256()


def _aligned(size: int) -> int:
    return size + (-size % ALIGNMENT)


def _digest(front: bytes | bytearray | memoryview) -> str:
    return f"sha256:{hashlib.sha256(front).hexdigest()}"


def _layer_chunks(modules: Sequence[ModuleEntry], payload: memoryview) -> list[LayerChunk]:
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
        raise ContainerError(f"unknown dtype {shortened(header.dtype)}")
    if not header.modules:
        raise ContainerError("no modules")
    end = 0
    seen: set[tuple[int, str]] = set()
    for entry in header.modules:
        if not _is_entry(entry) or entry.offset != end or (entry.layer, entry.module) in seen:
            raise ContainerError(
                f"bad entry for layer {shortened(entry.layer)}: {shortened(entry.module)}"
            )
        seen.add((entry.layer, entry.module))
        end += entry.a_bytes(header.dtype) + entry.b_bytes(header.dtype)
    if type(header.payload_bytes) is not int or end != header.payload_bytes:
        raise ContainerError("entries do not cover the payload")
    ranges = [(chunk.layer, chunk.offset, chunk.size_bytes) for chunk in header.layers]
    if not all(_is_chunk(chunk) for chunk in header.layers) or ranges != [
        (n, start, stop - start) for n, start, stop in _layer_ranges(header.modules, end)
    ]:
        raise ContainerError("layers are not those of the entries")


def _is_entry(entry: ModuleEntry) -> bool:
    """Whether the values, which come from JSON, are of their types and in range."""
    counts = (entry.rank, entry.in_features, entry.out_features)
    return (
        all(type(number) is int for number in (*counts, entry.layer, entry.offset))
        and min(counts) >= 1
        and entry.layer >= EMBEDDING_LAYER
        and type(entry.module) is str
        and type(entry.scale) in (int, float)
        and abs(entry.scale) <= _SCALE_MAX  # false for NaN as well
    )


def _is_chunk(chunk: LayerChunk) -> bool:
    numbers = (chunk.layer, chunk.offset, chunk.size_bytes)
    return all(type(number) is int for number in numbers) and type(chunk.sha256) is str
