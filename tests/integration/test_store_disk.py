"""The adapter store's disk when it is full or read-only, and how it goes on afterwards.

Real file systems: a small tmpfs is mounted where that is allowed.
"""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.adapter_store.blobs import Blobs, blob_path
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.storage import ObjectStorage, Timeouts, open_storage
from services.common.adapter_container import digest_of
from services.common.errors import Reason, RpcError
from tests.support.blob_bytes import hex_of, make_blob

SMALL = make_blob(layer_bytes=2**18, seed=1)
LARGE = make_blob(layer_bytes=2**21, seed=2)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
async def storage(tmp_path: Path) -> ObjectStorage:
    storage = open_storage((tmp_path / "store").as_uri(), Timeouts())
    for blob in (SMALL, LARGE):
        await storage.put(blob_path(digest_of(blob)), blob)
    return storage


@pytest.fixture
async def blobs(storage: ObjectStorage, volume: Path) -> AsyncIterator[Blobs]:
    blobs = Blobs(storage, DiskCache(volume / "blobs", bytes_max=2**30))
    yield blobs
    await blobs.close()


def _remount(volume: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(volume)], check=True)


async def _read(blobs: Blobs, blob: bytes) -> bytes:
    return b"".join([chunk.data async for chunk in blobs.read(digest_of(blob), offset=0)])


async def _error(blobs: Blobs, blob: bytes) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await _read(blobs, blob)
    return caught.value


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(
    blobs: Blobs, volume: Path
) -> None:
    assert await _read(blobs, SMALL) == SMALL
    error = await _error(blobs, LARGE)
    assert error.reason is Reason.STORE_UNAVAILABLE
    assert error.context.retry_after_s
    assert {path.name for path in (volume / "blobs").iterdir()} == {hex_of(SMALL)}
    assert await _read(blobs, SMALL) == SMALL
    _remount(volume, "size=16m")
    assert await _read(blobs, LARGE) == LARGE


async def test_a_read_only_disk_serves_what_it_has(
    blobs: Blobs, volume: Path, storage: ObjectStorage
) -> None:
    assert await _read(blobs, SMALL) == SMALL
    await asyncio.sleep(0.1)  # until it has been admitted
    other = make_blob(layer_bytes=2**16, seed=3)
    await storage.put(blob_path(digest_of(other)), other)
    _remount(volume, "ro")
    assert (await _error(blobs, other)).reason is Reason.STORE_UNAVAILABLE
    assert await _read(blobs, SMALL) == SMALL
    restarted = Blobs(storage, DiskCache(volume / "blobs", bytes_max=2**30))
    assert await _read(restarted, SMALL) == SMALL
    await restarted.close()
    _remount(volume, "rw")
    assert await _read(blobs, other) == other


async def test_a_store_whose_cache_folder_cannot_be_made_recovers_when_it_can(
    storage: ObjectStorage, volume: Path
) -> None:
    _remount(volume, "ro")
    blobs = Blobs(storage, DiskCache(volume / "x" / "blobs", bytes_max=2**30))
    assert (await _error(blobs, SMALL)).reason is Reason.STORE_UNAVAILABLE
    _remount(volume, "rw")
    assert await _read(blobs, SMALL) == SMALL
    await blobs.close()
