import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest

from services.adapter_store import fills
from services.adapter_store.blobs import CHUNK_BYTES, Blobs, blob_path
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.storage import (
    ObjectInfo,
    ObjectStorage,
    Timeouts,
    open_storage,
    unavailable,
)
from services.common.adapter_container import digest_of, read_header
from services.common.errors import Reason, RpcError
from tests.support.blob_bytes import flipped, hex_of, make_blob

BLOB = make_blob()
DIGEST = digest_of(BLOB)
FRONT_BYTES = read_header(BLOB).payload_offset


class BreakingStorage(ObjectStorage):
    """Counts ranges, breaks as many as told after some bytes, and can be held up at a byte."""

    ranges = 0
    breaks = 0
    break_after_bytes = 0
    hold_at_byte: int | None = None
    chunk_bytes = 2**18

    async def read_range(
        self, info: ObjectInfo, *, start: int, stop: int
    ) -> AsyncGenerator[memoryview]:
        self.ranges += 1
        breaks_at = None
        if self.breaks:
            self.breaks -= 1
            breaks_at = start + self.break_after_bytes
        position = start
        async for data in super().read_range(info, start=start, stop=stop):
            for first in range(0, len(data), self.chunk_bytes):
                part = data[first : first + self.chunk_bytes]
                while self.hold_at_byte is not None and position + len(part) > self.hold_at_byte:
                    await asyncio.sleep(0.005)
                if breaks_at is not None and position + len(part) > breaks_at:
                    if kept := part[: breaks_at - position]:
                        yield kept
                    raise unavailable("reset")
                position += len(part)
                yield part


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


async def _collect(blobs: Blobs, digest: str, got: bytearray) -> None:
    async for chunk in blobs.read(digest, offset=0):
        got += chunk.data


async def _error(blobs: Blobs, digest: str, offset: int = 0) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await _read(blobs, digest, offset)
    return caught.value


async def _kept(folder: Path, blob: bytes) -> Path:
    """The blob's file, once the disk cache has it."""
    file = folder / hex_of(blob)
    async with asyncio.timeout(10):
        while not file.exists():
            await asyncio.sleep(0.005)
    return file


@pytest.mark.parametrize("offset", [0, 1, FRONT_BYTES, CHUNK_BYTES, len(BLOB) - 1, len(BLOB)])
async def test_a_blob_is_read_from_any_offset(blobs: Blobs, offset: int) -> None:
    await blobs.put(DIGEST, BLOB)
    assert await _read(blobs, DIGEST, offset) == BLOB[offset:]  # while it is fetched
    assert await _read(blobs, DIGEST, offset) == BLOB[offset:]  # from the disk cache


@pytest.mark.parametrize("offset", [-1, len(BLOB) + 1, 2**62])
async def test_an_offset_outside_the_blob_is_refused(blobs: Blobs, offset: int) -> None:
    await blobs.put(DIGEST, BLOB)
    for _ in range(2):
        error = await _error(blobs, DIGEST, offset)
        assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "offset")


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
    error = await _error(blobs, digest)
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "digest")
    with pytest.raises(RpcError):
        blob_path(digest)


async def test_an_unknown_digest_is_not_found(blobs: Blobs) -> None:
    assert (await _error(blobs, DIGEST)).reason is Reason.ADAPTER_NOT_FOUND
    await blobs.put(DIGEST, BLOB)
    assert await _read(blobs, DIGEST) == BLOB


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        BLOB[:100],
        BLOB[:-1],
        BLOB + b"x",
        flipped(BLOB, 0),
        flipped(BLOB, 9),
        flipped(BLOB, FRONT_BYTES - 1),
        make_blob(seed=1),
    ],
)
async def test_bytes_without_their_digest_are_never_sent(
    blobs: Blobs, storage: BreakingStorage, stored: bytes, tmp_path: Path
) -> None:
    await storage.put(blob_path(DIGEST), stored)
    for _ in range(2):
        with pytest.raises(RpcError) as caught:
            await anext(blobs.read(DIGEST, offset=0))
        assert caught.value.reason is Reason.ADAPTER_CORRUPT
    assert not list((tmp_path / "cache").iterdir())
    await blobs.put(DIGEST, BLOB)  # publishing again heals it
    assert await _read(blobs, DIGEST) == BLOB


async def test_a_wrong_layer_ends_the_blob_before_that_layer(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    layers = read_header(BLOB).layers
    await storage.put(blob_path(DIGEST), flipped(BLOB, FRONT_BYTES + layers[1].offset + 5))
    got = bytearray()
    with pytest.raises(RpcError) as caught:
        await _collect(blobs, DIGEST, got)
    assert caught.value.reason is Reason.ADAPTER_CORRUPT
    assert BLOB.startswith(got)
    assert len(got) <= FRONT_BYTES + layers[1].offset


async def test_what_is_verified_is_sent_while_the_rest_still_comes(
    blobs: Blobs, storage: BreakingStorage, tmp_path: Path
) -> None:
    await blobs.put(DIGEST, BLOB)
    layer = read_header(BLOB).layers[1]
    storage.chunk_bytes = 4096
    storage.hold_at_byte = FRONT_BYTES + layer.offset + 8192  # within layer 1
    async with asyncio.timeout(10):
        async with aclosing(blobs.read(DIGEST, offset=0)) as chunks:
            got = b""
            while len(got) < FRONT_BYTES + layer.offset:
                got += (await anext(chunks)).data
            assert got == BLOB[: FRONT_BYTES + layer.offset]  # layer 0, and nothing of layer 1
            late = asyncio.create_task(_read(blobs, DIGEST, len(BLOB) - 10))
            await asyncio.sleep(0.05)
            assert not late.done()
            storage.hold_at_byte = None
            async for chunk in chunks:
                got += chunk.data
        assert got == BLOB
        assert await late == BLOB[-10:]
    assert storage.ranges == 1


async def test_a_damaged_cache_file_is_noticed_and_replaced(
    blobs: Blobs, storage: BreakingStorage, tmp_path: Path
) -> None:
    await blobs.put(DIGEST, BLOB)
    await _read(blobs, DIGEST)
    cached = await _kept(tmp_path / "cache", BLOB)
    await asyncio.sleep(0.02)  # file systems tell times apart by some milliseconds
    cached.write_bytes(flipped(BLOB, len(BLOB) - 1))
    assert await _read(blobs, DIGEST) == BLOB
    assert storage.ranges == 2


async def test_a_cache_file_of_an_earlier_process_is_verified_before_use(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / hex_of(BLOB)).write_bytes(flipped(BLOB, FRONT_BYTES + 2**20 + 7))
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=2**30))
    await blobs.put(DIGEST, BLOB)
    assert await _read(blobs, DIGEST, 1) == BLOB[1:]
    assert storage.ranges == 1
    await blobs.close()
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=2**30))
    for _ in range(2):
        assert await _read(blobs, DIGEST, 1) == BLOB[1:]
    assert storage.ranges == 1  # what is right on disk is not downloaded again
    await blobs.close()


async def test_a_hundred_readers_cause_one_download(blobs: Blobs, storage: BreakingStorage) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.hold_at_byte = 2**20
    readers = [asyncio.create_task(_read(blobs, DIGEST, offset)) for offset in range(100)]
    await asyncio.sleep(0.1)
    storage.hold_at_byte = None
    assert await asyncio.gather(*readers) == [BLOB[offset:] for offset in range(100)]
    assert storage.ranges == 1


async def test_a_first_reader_that_gives_up_does_not_fail_the_others(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.hold_at_byte = 2**20
    first = asyncio.create_task(_read(blobs, DIGEST))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(_read(blobs, DIGEST))
    await asyncio.sleep(0.05)
    first.cancel()
    storage.hold_at_byte = None
    assert await second == BLOB
    assert storage.ranges == 1


async def test_a_fill_that_everybody_has_left_still_ends(
    blobs: Blobs, storage: BreakingStorage, tmp_path: Path
) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.hold_at_byte = 2**20
    only = asyncio.create_task(_read(blobs, DIGEST))
    await asyncio.sleep(0.05)
    only.cancel()
    storage.hold_at_byte = None
    await _kept(tmp_path / "cache", BLOB)
    assert await _read(blobs, DIGEST) == BLOB
    assert storage.ranges == 1


async def test_who_has_read_all_of_a_blob_finds_it_on_disk(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put(DIGEST, BLOB)
    await _read(blobs, DIGEST)
    assert (tmp_path / "cache" / hex_of(BLOB)).read_bytes() == BLOB


async def test_all_readers_of_a_fill_that_fails_get_its_error(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.breaks = 1000
    readers = [_error(blobs, DIGEST, offset) for offset in range(20)]
    errors = await asyncio.gather(*readers)
    assert {error.reason for error in errors} == {Reason.OBJECT_STORAGE_UNAVAILABLE}
    assert all(error.context.retry_after_s for error in errors)


async def test_a_broken_read_goes_on_where_it_ended(blobs: Blobs, storage: BreakingStorage) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.breaks, storage.break_after_bytes = 2, 1000
    assert await _read(blobs, DIGEST) == BLOB
    assert storage.ranges == 3


async def test_a_read_that_breaks_every_time_is_given_up(
    blobs: Blobs, storage: BreakingStorage, tmp_path: Path
) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.breaks = 1000
    assert (await _error(blobs, DIGEST)).reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert not list((tmp_path / "cache").iterdir())
    storage.breaks = 0
    assert await _read(blobs, DIGEST) == BLOB


async def test_an_object_that_is_replaced_while_it_is_read_is_read_again(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    await blobs.put(DIGEST, BLOB)
    storage.hold_at_byte = 2**20
    reader = asyncio.create_task(_read(blobs, DIGEST))
    await asyncio.sleep(0.05)
    storage.breaks, storage.break_after_bytes = 1, 0
    await storage.put(blob_path(DIGEST), make_blob(seed=7))
    await storage.put(blob_path(DIGEST), BLOB)
    storage.hold_at_byte = None
    assert await reader == BLOB


async def test_an_object_that_is_too_large_for_an_adapter_is_not_read(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    blobs = Blobs(
        storage, DiskCache(tmp_path / "cache", bytes_max=2**30), blob_bytes_max=len(BLOB) - 1
    )
    await blobs.put(DIGEST, BLOB)
    assert (await _error(blobs, DIGEST)).reason is Reason.ADAPTER_CORRUPT
    assert storage.ranges == 0
    await blobs.close()


async def test_an_object_that_is_larger_than_its_header_says_is_left_after_the_header(
    blobs: Blobs, storage: BreakingStorage, tmp_path: Path
) -> None:
    path = tmp_path / "store" / blob_path(DIGEST)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(BLOB)
        file.truncate(10 * 2**30)  # sparse
    assert (await _error(blobs, DIGEST)).reason is Reason.ADAPTER_CORRUPT
    assert storage.ranges <= 4  # two for each of two tries, of 1280


async def test_the_cache_keeps_within_its_bytes_and_drops_the_least_used(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    data = {name: make_blob(layer_bytes=2**16, seed=ord(name)) for name in "abc"}
    size_bytes = len(data["a"])
    cache = DiskCache(tmp_path / "cache", bytes_max=2 * size_bytes + 1)
    blobs = Blobs(storage, cache)
    for blob in data.values():
        await blobs.put(digest_of(blob), blob)
    for name in "abac":  # c pushes out b
        await _read(blobs, digest_of(data[name]))
        await _kept(tmp_path / "cache", data[name])
    await blobs.close()
    assert cache.size_bytes == 2 * size_bytes
    on_disk = {path.name for path in (tmp_path / "cache").iterdir()}
    assert on_disk == {hex_of(data[name]) for name in "ac"}


async def test_blobs_that_arrive_together_stay_within_the_cache(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    data = [make_blob(layer_bytes=2**16, seed=seed) for seed in range(12)]
    bytes_max = 3 * len(data[0])
    cache = DiskCache(tmp_path / "cache", bytes_max=bytes_max)
    blobs = Blobs(storage, cache)
    for blob in data:
        await blobs.put(digest_of(blob), blob)
    reading = asyncio.gather(*(_read(blobs, digest_of(blob)) for blob in data))
    on_disk: list[int] = []
    while not reading.done():
        sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.exists()]
        on_disk.append(sum(sizes))
        await asyncio.sleep(0.001)
    assert await reading == data
    assert max(on_disk) <= bytes_max
    await blobs.close()


async def test_a_blob_over_the_cache_limit_is_served_and_not_kept(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    blobs = Blobs(storage, DiskCache(tmp_path / "cache", bytes_max=1000))
    await blobs.put(DIGEST, BLOB)
    assert await _read(blobs, DIGEST) == BLOB
    await blobs.close()
    assert not list((tmp_path / "cache").iterdir())


async def test_a_reader_keeps_a_blob_that_is_dropped_meanwhile(
    storage: BreakingStorage, tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path / "cache", bytes_max=2**30)
    blobs = Blobs(storage, cache)
    await blobs.put(DIGEST, BLOB)
    await _read(blobs, DIGEST)
    async with aclosing(blobs.read(DIGEST, offset=0)) as chunks:
        data = (await anext(chunks)).data
        cache.discard(hex_of(BLOB))
        async for chunk in chunks:
            data += chunk.data
    assert data == BLOB
    await blobs.close()


async def test_readers_at_a_time_have_a_limit(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapter_store.blobs.READERS_MAX", 1)
    await blobs.put(DIGEST, BLOB)
    async with aclosing(blobs.read(DIGEST, offset=0)) as chunks:
        await anext(chunks)
        error = await _error(blobs, DIGEST)
        assert error.reason is Reason.TOO_MANY_REQUESTS
        assert error.context.retry_after_s
    assert await _read(blobs, DIGEST) == BLOB


async def test_fills_that_wait_have_a_limit(
    blobs: Blobs, storage: BreakingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fills, "FILLS_MAX", 1)
    other = make_blob(seed=1)
    await blobs.put(DIGEST, BLOB)
    await blobs.put(digest_of(other), other)
    storage.hold_at_byte = 0
    reader = asyncio.create_task(_read(blobs, DIGEST))
    await asyncio.sleep(0.05)
    assert (await _error(blobs, digest_of(other))).reason is Reason.TOO_MANY_REQUESTS
    storage.hold_at_byte = None
    assert await reader == BLOB
    while blobs._fills.arriving(DIGEST):
        await asyncio.sleep(0.005)
    assert await _read(blobs, digest_of(other)) == other


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("seed", range(5))
async def test_a_crowd_of_readers_on_bad_storage_gets_right_bytes_and_leaves_nothing_behind(
    storage: BreakingStorage, tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    data = [make_blob(layer_bytes=2**14, seed=n) for n in range(10)]
    cache = DiskCache(tmp_path / "cache", bytes_max=3 * len(data[0]))
    blobs = Blobs(storage, cache, bad_ttl_s=0)
    for blob in data:
        await blobs.put(digest_of(blob), blob)
    storage.chunk_bytes = 5000
    files_open = _open_files()

    reasons: set[Reason] = set()

    async def read(blob: bytes) -> None:
        offset = random.randrange(len(blob))
        try:
            async with asyncio.timeout(random.choice([0.002, 0.02, 30])):
                assert await _read(blobs, digest_of(blob), offset) == blob[offset:]
        except RpcError as error:
            reasons.add(error.reason)
        except TimeoutError:
            pass

    for _ in range(6):
        storage.breaks = random.randrange(12)
        storage.break_after_bytes = random.randrange(40_000)
        await asyncio.gather(*(read(random.choice(data)) for _ in range(40)))
        for path in (tmp_path / "cache").iterdir():
            if random.random() < 0.2:
                path.unlink(missing_ok=True)  # somebody tidies up
    assert reasons <= {Reason.OBJECT_STORAGE_UNAVAILABLE}
    storage.breaks = 0
    for blob in data:
        assert await _read(blobs, digest_of(blob)) == blob
    await blobs.close()
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert on_disk <= cache.size_bytes <= 3 * len(data[0])
    assert _open_files() <= files_open


async def test_whether_a_blob_is_stored_is_told_by_its_size(
    blobs: Blobs, storage: BreakingStorage
) -> None:
    assert not await blobs.is_stored(DIGEST, len(BLOB))
    await storage.put(blob_path(DIGEST), BLOB[:-1])
    assert not await blobs.is_stored(DIGEST, len(BLOB))
    await blobs.put(DIGEST, BLOB)
    assert await blobs.is_stored(DIGEST, len(BLOB))
