import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from services.adapter_store.blobs import CHUNK_BYTES, Blobs, blob_path
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.storage import (
    ObjectInfo,
    ObjectStorage,
    Timeouts,
    open_storage,
    unavailable,
)
from services.common.errors import Reason, RpcError

BLOB = os.urandom(2 * CHUNK_BYTES + 17)


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


class BreakingStorage(ObjectStorage):
    """Counts streams, and breaks as many as told after some bytes."""

    streams = 0
    breaks = 0
    break_after_bytes = 0
    delay_s = 0.0

    async def stream(self, path: str, *, offset: int) -> AsyncGenerator[bytes]:
        self.streams += 1
        sent = 0
        async for data in super().stream(path, offset=offset):
            await asyncio.sleep(self.delay_s)
            if self.breaks and sent + len(data) > self.break_after_bytes:
                self.breaks -= 1
                if part := data[: self.break_after_bytes - sent]:
                    yield part
                raise unavailable("reset")
            sent += len(data)
            yield data


@pytest.fixture
def storage(tmp_path: Path) -> BreakingStorage:
    inner = open_storage((tmp_path / "store").as_uri(), Timeouts())
    return BreakingStorage(inner._store, Timeouts())


@pytest.fixture
async def blobs(storage: BreakingStorage, tmp_path: Path) -> AsyncIterator[Blobs]:
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=2**30))
    yield blobs
    await blobs.close()


async def _read(blobs: Blobs, digest: str, offset: int = 0) -> bytes:
    data = b""
    async for chunk in blobs.read(digest, offset=offset):
        assert chunk.offset == offset + len(data)
        assert len(chunk.data) <= CHUNK_BYTES
        data += chunk.data
    return data


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(BLOB) - 1, len(BLOB)])
async def test_a_blob_is_read_from_any_offset(blobs: Blobs, offset: int) -> None:
    await blobs.put(_digest(BLOB), BLOB)
    assert await _read(blobs, _digest(BLOB), offset) == BLOB[offset:]


@pytest.mark.parametrize("offset", [-1, len(BLOB) + 1, 2**62])
async def test_an_offset_outside_the_blob_is_refused(blobs: Blobs, offset: int) -> None:
    await blobs.put(_digest(BLOB), BLOB)
    with pytest.raises(RpcError) as caught:
        await _read(blobs, _digest(BLOB), offset)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.context.field == "offset"


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:../../etc/passwd",
        "sha256:" + "G" * 64,
        "sha256:" + "A" * 64,
        "sha256:" + "0" * 63 + "\n",
        "md5:" + "0" * 64,
        "0" * 64,
    ],
)
async def test_what_is_no_digest_never_reaches_storage(blobs: Blobs, digest: str) -> None:
    with pytest.raises(RpcError) as caught:
        await _read(blobs, digest)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.context.field == "digest"
    with pytest.raises(RpcError):
        blob_path(digest)


async def test_an_unknown_digest_is_not_found(blobs: Blobs) -> None:
    with pytest.raises(RpcError) as caught:
        await _read(blobs, _digest(b"nobody"))
    assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
    await blobs.put(_digest(b"nobody"), b"nobody")
    assert await _read(blobs, _digest(b"nobody")) == b"nobody"


@pytest.mark.parametrize("stored", [b"", BLOB[:-1], BLOB + b"x", bytes([BLOB[0] ^ 1]) + BLOB[1:]])
async def test_bytes_without_their_digest_are_never_sent(
    blobs: Blobs, storage: BreakingStorage, stored: bytes, tmp_path: Path
) -> None:
    await storage.put(blob_path(_digest(BLOB)), stored)
    for _ in range(2):
        with pytest.raises(RpcError) as caught:
            await anext(blobs.read(_digest(BLOB), offset=0))
        assert caught.value.reason is Reason.ADAPTER_CORRUPT
    assert not list((tmp_path / "cache").iterdir())
    await blobs.put(_digest(BLOB), BLOB)  # publishing again heals it
    assert await _read(blobs, _digest(BLOB)) == BLOB


async def test_a_damaged_cache_file_is_noticed_and_replaced(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put(_digest(BLOB), BLOB)
    await _read(blobs, _digest(BLOB))
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(BLOB[:-1] + bytes([BLOB[-1] ^ 1]))
    with pytest.raises(RpcError) as caught:
        await _read(blobs, _digest(BLOB))
    assert caught.value.reason is Reason.ADAPTER_CORRUPT
    assert await _read(blobs, _digest(BLOB)) == BLOB


async def test_a_cache_file_of_an_earlier_process_is_verified_before_use(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / hashlib.sha256(BLOB).hexdigest()
    file.write_bytes(BLOB[::-1])
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=2**30))
    await blobs.put(_digest(BLOB), BLOB)
    assert await _read(blobs, _digest(BLOB), 1) == BLOB[1:]
    assert storage.streams == 1
    await blobs.close()
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=2**30))
    assert await _read(blobs, _digest(BLOB), 1) == BLOB[1:]
    assert storage.streams == 1  # what is right on disk is not downloaded again
    await blobs.close()


async def test_a_hundred_readers_cause_one_download(blobs: Blobs, storage: BreakingStorage) -> None:
    storage.delay_s = 0.01
    await blobs.put(_digest(BLOB), BLOB)
    read = await asyncio.gather(*(_read(blobs, _digest(BLOB)) for _ in range(100)))
    assert all(data == BLOB for data in read)
    assert storage.streams == 1


async def test_a_first_reader_that_gives_up_does_not_fail_the_others(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    storage.delay_s = 0.05
    await blobs.put(_digest(BLOB), BLOB)
    first = asyncio.create_task(_read(blobs, _digest(BLOB)))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(_read(blobs, _digest(BLOB)))
    await asyncio.sleep(0.02)
    first.cancel()
    assert await second == BLOB
    assert storage.streams == 1


async def test_a_broken_read_goes_on_where_it_ended(blobs: Blobs, storage: BreakingStorage) -> None:
    await blobs.put(_digest(BLOB), BLOB)
    storage.breaks, storage.break_after_bytes = 2, 1000
    assert await _read(blobs, _digest(BLOB)) == BLOB
    assert storage.streams == 3


async def test_a_read_that_breaks_every_time_is_given_up(
    blobs: Blobs, storage: BreakingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapter_store.blobs.READ_ATTEMPTS_MAX", 2)
    await blobs.put(_digest(BLOB), BLOB)
    storage.breaks = 1000
    with pytest.raises(RpcError) as caught:
        await _read(blobs, _digest(BLOB))
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    storage.breaks = 0
    assert await _read(blobs, _digest(BLOB)) == BLOB


async def test_storage_that_does_not_answer_in_time_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage((tmp_path / "store").as_uri(), Timeouts())

    async def never(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("services.adapter_store.storage.obstore.head_async", never)
    slow = ObjectStorage(storage._store, Timeouts(call_s=0.05))
    with pytest.raises(RpcError) as caught:
        await slow.head("x")
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_the_cache_keeps_within_its_bytes_and_drops_the_least_used(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path / "cache", bytes_max=2500)
    blobs = Blobs(storage, cache)
    data = {name: os.urandom(1000) for name in "abc"}
    for blob in data.values():
        await blobs.put(_digest(blob), blob)
    for name in "abac":  # c pushes out b
        await _read(blobs, _digest(data[name]))
    assert cache.size_bytes == 2000
    on_disk = {path.name for path in (tmp_path / "cache").iterdir()}
    assert on_disk == {hashlib.sha256(data[name]).hexdigest() for name in "ac"}
    await blobs.close()


async def test_a_blob_over_the_cache_limit_is_still_served(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=1000))
    await blobs.put(_digest(BLOB), BLOB)
    assert await _read(blobs, _digest(BLOB)) == BLOB
    await blobs.close()


async def test_a_reader_keeps_a_blob_that_is_dropped_meanwhile(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path / "cache", bytes_max=2**30)
    blobs = Blobs(storage, cache)
    await blobs.put(_digest(BLOB), BLOB)
    chunks = blobs.read(_digest(BLOB), offset=0)
    data = (await anext(chunks)).data
    cache.discard(hashlib.sha256(BLOB).hexdigest())
    async for chunk in chunks:
        data += chunk.data
    assert data == BLOB
    await blobs.close()


async def test_a_cache_that_cannot_be_written_says_so(
    storage: BreakingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path / "cache", bytes_max=2**30)
    blobs = Blobs(storage, cache)
    await blobs.put(_digest(BLOB), BLOB)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("services.adapter_store.blobs._write", full)
        with pytest.raises(RpcError) as caught:
            await _read(blobs, _digest(BLOB))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert not list((tmp_path / "cache").iterdir())
    assert await _read(blobs, _digest(BLOB)) == BLOB
    await blobs.close()


async def test_whether_a_blob_is_stored_is_told_by_its_size(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    assert not await blobs.is_stored(_digest(BLOB), len(BLOB))
    await storage.put(blob_path(_digest(BLOB)), BLOB[:-1])
    assert not await blobs.is_stored(_digest(BLOB), len(BLOB))
    await blobs.put(_digest(BLOB), BLOB)
    assert await blobs.is_stored(_digest(BLOB), len(BLOB))


def test_a_url_of_another_kind_is_refused() -> None:
    for url in (
        "http://host/x",
        "memory:///",
        "ftp://x",
        "no-url",
        "",
        "s3:///x",
        "file:///proc/x",
    ):
        with pytest.raises(ValueError, match="store_url"):
            open_storage(url, Timeouts())


async def test_names_of_objects_are_as_written(storage: BreakingStorage) -> None:
    await storage.put("x/a", b"1")
    assert [info.path for info in await storage.list("x")] == ["x/a"]
    assert isinstance((await storage.list("x"))[0], ObjectInfo)
