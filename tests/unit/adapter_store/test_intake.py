from pathlib import Path

import pytest

from services.adapter_store.disk_cache import DiskCache, OpenFile
from services.adapter_store.intake import STEP_BYTES_MAX, Intake
from services.common.adapter_container import ContainerError, digest_of, read_header
from tests.support.blob_bytes import flipped, make_blob

BLOB = make_blob(layer_bytes=2**18, layers=4)
HEADER = read_header(BLOB)
FRONT_BYTES = HEADER.payload_offset
ENDS = [FRONT_BYTES + layer.offset + layer.size_bytes for layer in HEADER.layers]


@pytest.fixture
def file(tmp_path: Path) -> OpenFile:
    cache = DiskCache(tmp_path, bytes_max=2**30)
    assert cache.reserve(len(BLOB))
    return cache.new_partial(len(BLOB)).file


def _begun(file: OpenFile, stored: bytes = BLOB) -> Intake:
    """An intake that has the front and nothing else."""
    intake = Intake(digest_of(BLOB), file, size_bytes=len(stored))
    intake.hold([memoryview(stored)[:FRONT_BYTES]])
    assert intake.is_worth_a_step()
    intake.take()
    return intake


def test_what_may_complete_the_front_is_worth_a_step(file: OpenFile) -> None:
    intake = Intake(digest_of(BLOB), file, size_bytes=len(BLOB))
    intake.hold([memoryview(BLOB)[:3]])
    assert intake.is_worth_a_step()
    intake.take()
    assert (intake.verified_bytes, intake.total_bytes) == (0, None)
    intake.hold([memoryview(BLOB)[3:FRONT_BYTES]])
    assert intake.is_worth_a_step()
    intake.take()
    assert (intake.verified_bytes, intake.total_bytes) == (FRONT_BYTES, len(BLOB))


def test_part_of_a_layer_is_held_until_the_layer_is_complete(file: OpenFile) -> None:
    intake = _begun(file)
    intake.hold([memoryview(BLOB)[FRONT_BYTES : ENDS[0] - 1]])
    assert not intake.is_worth_a_step()
    intake.hold([memoryview(BLOB)[ENDS[0] - 1 : ENDS[0]]])
    assert intake.is_worth_a_step()
    intake.take()
    assert intake.verified_bytes == ENDS[0]


def test_what_is_held_of_a_large_layer_has_a_limit(tmp_path: Path) -> None:
    blob = make_blob(layer_bytes=2**22, layers=1)
    cache = DiskCache(tmp_path, bytes_max=2**30)
    assert cache.reserve(len(blob))
    intake = Intake(digest_of(blob), cache.new_partial(len(blob)).file, size_bytes=len(blob))
    front_bytes = read_header(blob).payload_offset
    intake.hold([memoryview(blob)[:front_bytes]])
    intake.take()
    intake.hold([memoryview(blob)[front_bytes : front_bytes + STEP_BYTES_MAX - 1]])
    assert not intake.is_worth_a_step()
    intake.hold([memoryview(blob)[front_bytes + STEP_BYTES_MAX - 1 : front_bytes + STEP_BYTES_MAX]])
    assert intake.is_worth_a_step()


@pytest.mark.parametrize("chunk_bytes", [1000, 2**18, len(BLOB)])
def test_verified_bytes_are_in_the_file_and_nothing_stays_held(
    file: OpenFile, chunk_bytes: int
) -> None:
    intake = Intake(digest_of(BLOB), file, size_bytes=len(BLOB))
    for start in range(0, len(BLOB), chunk_bytes):
        intake.hold([memoryview(BLOB)[start : start + chunk_bytes]])
        if intake.is_worth_a_step():
            intake.take()
        verified = intake.verified_bytes
        assert file.read(0, verified) == BLOB[:verified]
    intake.check_complete()
    assert intake.verified_bytes == len(BLOB)


def test_a_wrong_layer_is_refused_and_what_lies_before_it_stays_verified(file: OpenFile) -> None:
    stored = flipped(BLOB, ENDS[0] + 7)
    intake = _begun(file, stored)
    intake.hold([memoryview(stored)[FRONT_BYTES:]])
    with pytest.raises(ContainerError, match="layer 1"):
        intake.take()
    assert intake.verified_bytes == ENDS[0]


def test_an_object_of_another_size_than_its_header_says_is_refused_with_the_header(
    file: OpenFile,
) -> None:
    intake = Intake(digest_of(BLOB), file, size_bytes=len(BLOB) + 1)
    intake.hold([memoryview(BLOB)[:FRONT_BYTES]])
    with pytest.raises(ContainerError, match="bytes instead of"):
        intake.take()


@pytest.mark.parametrize("stop", [0, FRONT_BYTES - 1, FRONT_BYTES, len(BLOB) - 1])
def test_a_blob_that_ends_early_is_not_complete(file: OpenFile, stop: int) -> None:
    intake = Intake(digest_of(BLOB), file, size_bytes=len(BLOB))
    intake.hold([memoryview(BLOB)[:stop]])
    intake.take()
    with pytest.raises(ContainerError, match=f"ends after {stop} bytes"):
        intake.check_complete()
