"""A blob is checked while it arrives: nothing that is wrong is ever called verified."""

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.adapter_container import (
    EMBEDDING,
    EMBEDDING_LAYER,
    HEAD,
    HEADER_BYTES_MAX,
    MAGIC,
    BlobVerifier,
    ContainerError,
    LoraRows,
    digest_of,
    encode,
    read_header,
    verify,
)

NUM_LAYERS = 3
WIDTH = 16


def _rows(layer: int, module: str, *, rank: int = 2) -> LoraRows:
    generator = np.random.default_rng(layer + 1)
    size_bytes = rank * WIDTH * 2
    a, bt = generator.bytes(size_bytes), generator.bytes(size_bytes)
    return LoraRows(layer, module, rank, 2.0, WIDTH, WIDTH, a, bt)


def _blob(*layers: int) -> bytes:
    names = {EMBEDDING_LAYER: EMBEDDING, NUM_LAYERS: HEAD}
    return encode([_rows(layer, names.get(layer, "q_proj")) for layer in layers], dtype="BF16")


BLOB = _blob(-1, 0, 1, 2, 3)
DIGEST = digest_of(BLOB)
HEADER = read_header(BLOB)
ENDS = [HEADER.payload_offset + chunk.offset + chunk.size_bytes for chunk in HEADER.layers]
BOUNDARIES = [0, HEADER.payload_offset, *ENDS]

splits = st.lists(st.integers(0, len(BLOB)), max_size=12).map(
    lambda cuts: [0, *sorted(cuts), len(BLOB)]
)


def _parts(blob: bytes, cuts: list[int]) -> list[memoryview]:
    ends = [*cuts[1:-1], len(blob)]
    return [memoryview(blob)[start:end] for start, end in zip(cuts, ends, strict=False)]


@settings(deadline=None)
@given(splits)
def test_a_blob_in_any_parts_is_verified_up_to_the_last_whole_layer(cuts: list[int]) -> None:
    verifier = BlobVerifier(DIGEST)
    fed_bytes = 0
    for part in _parts(BLOB, cuts):
        verifier.feed(part)
        fed_bytes += len(part)
        assert verifier.verified_bytes == max(end for end in BOUNDARIES if end <= fed_bytes)
        assert (verifier.header is None) == (fed_bytes < HEADER.payload_offset)
        assert verifier.is_complete == (fed_bytes == len(BLOB))
    assert verifier.header == HEADER


@settings(deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255), splits)
@example(10, 1, [0, len(BLOB)])
def test_a_changed_byte_is_never_verified(position: int, flip: int, cuts: list[int]) -> None:
    blob = bytearray(BLOB)
    blob[position] ^= flip
    is_refused = _is_refused(bytes(blob), cuts)
    # A header that claims to be longer is waited for.
    assert is_refused or position in range(8, 12)


@settings(deadline=None)
@given(st.integers(0, len(BLOB)), st.binary(min_size=1, max_size=3), splits)
def test_bytes_put_in_are_never_verified(position: int, more: bytes, cuts: list[int]) -> None:
    _is_refused(BLOB[:position] + more + BLOB[position:], cuts)


@settings(deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 3), splits)
def test_bytes_left_out_are_never_verified(position: int, count: int, cuts: list[int]) -> None:
    _is_refused(BLOB[:position] + BLOB[position + count :], cuts)


def _is_refused(blob: bytes, cuts: list[int]) -> bool:
    """Whether a blob that is not `BLOB` is refused before its end, with what must hold for it."""
    pairs = enumerate(zip(blob, BLOB, strict=False))
    first_wrong = next((at for at, (a, b) in pairs if a != b), min(len(blob), len(BLOB)))
    verifier = BlobVerifier(DIGEST)
    is_refused = False
    try:
        for part in _parts(blob, [min(cut, len(blob)) for cut in cuts]):
            verifier.feed(part)
            assert verifier.verified_bytes <= first_wrong
    except ContainerError:
        is_refused = True
    assert verifier.verified_bytes <= first_wrong
    with pytest.raises(ContainerError):
        verify(blob, DIGEST)
    return is_refused


def test_bytes_behind_the_last_layer_are_refused() -> None:
    verifier = BlobVerifier(DIGEST)
    verifier.feed(BLOB)
    with pytest.raises(ContainerError):
        verifier.feed(b"\0")
    assert verifier.verified_bytes == len(BLOB)


def test_what_was_wrong_stays_refused() -> None:
    for position in (20, ENDS[1] - 1):
        blob = bytearray(BLOB)
        blob[position] ^= 1
        verifier = BlobVerifier(DIGEST)
        with pytest.raises(ContainerError):
            verifier.feed(blob)
        verified_bytes = verifier.verified_bytes
        with pytest.raises(ContainerError):
            verifier.feed(BLOB)
        assert verifier.verified_bytes == verified_bytes


def test_a_whole_blob_is_what_its_digest_says() -> None:
    assert verify(BLOB, DIGEST) == HEADER
    assert verify(memoryview(BLOB), DIGEST) == HEADER


@pytest.mark.parametrize("digest", ["", "sha256:", DIGEST.upper(), digest_of(_blob(0)), DIGEST[7:]])
def test_another_digest_is_refused(digest: str) -> None:
    verifier = BlobVerifier(digest)
    with pytest.raises(ContainerError):
        verifier.feed(BLOB)
    assert verifier.verified_bytes == 0
    assert verifier.header is None


def _front(raw: bytes) -> bytes:
    prefix = struct.pack("<8sI", MAGIC, len(raw)) + raw
    return prefix + bytes(-len(prefix) % 256)


@pytest.mark.parametrize(
    "front",
    [
        _front(b""),
        _front(b"{}"),
        _front(b"\xff\xfe"),
        _front(json.dumps({"dtype": "BF16", "modules": [], "layers": []}).encode()),
    ],
)
def test_a_malformed_header_is_refused_though_its_digest_is_right(front: bytes) -> None:
    verifier = BlobVerifier(f"sha256:{hashlib.sha256(front).hexdigest()}")
    with pytest.raises(ContainerError):
        verifier.feed(front)
    assert verifier.verified_bytes == 0


@pytest.mark.parametrize("size_bytes", [HEADER_BYTES_MAX + 1, 2**32 - 1])
def test_a_header_that_would_be_too_large_is_refused_at_the_prefix(size_bytes: int) -> None:
    verifier = BlobVerifier(DIGEST)
    with pytest.raises(ContainerError):
        verifier.feed(struct.pack("<8sI", MAGIC, size_bytes))


def test_a_header_that_claims_to_be_shorter_is_another_header() -> None:
    blob = bytearray(BLOB)
    (size_bytes,) = struct.unpack_from("<I", blob, 8)
    struct.pack_into("<I", blob, 8, size_bytes - 256)
    with pytest.raises(ContainerError):
        BlobVerifier(DIGEST).feed(blob)


def test_nothing_at_all_is_not_verified() -> None:
    verifier = BlobVerifier(DIGEST)
    verifier.feed(b"")
    assert verifier.verified_bytes == 0
    with pytest.raises(ContainerError):
        verify(b"", DIGEST)


layer_sets = st.sets(st.integers(-1, NUM_LAYERS), min_size=1).map(sorted)


@settings(deadline=None)
@given(layer_sets, st.data())
def test_layers_within_are_those_that_have_all_their_rows(
    layers: list[int], data: st.DataObject
) -> None:
    blob = _blob(*layers)
    header = read_header(blob)
    blob_bytes = data.draw(st.integers(0, len(blob)))
    missing = {
        chunk.layer
        for chunk in header.layers
        if header.payload_offset + chunk.offset + chunk.size_bytes > blob_bytes
    }
    ready = header.layers_within(blob_bytes, num_layers=NUM_LAYERS)
    # A layer can be computed when it and all before it, the embedding too, have their rows.
    can_run = [not any(at <= layer for at in missing) for layer in range(NUM_LAYERS)]
    assert ready == sum(can_run)
    assert can_run == [True] * ready + [False] * (NUM_LAYERS - ready)


def test_more_bytes_never_mean_fewer_layers() -> None:
    counts = [HEADER.layers_within(size, num_layers=NUM_LAYERS) for size in range(len(BLOB) + 1)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, NUM_LAYERS)
