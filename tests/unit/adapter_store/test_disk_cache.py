import fcntl
import os
import threading
from pathlib import Path

import pytest

from services.adapter_store.disk_cache import DiskCache, OpenFile
from tests.support.blob_bytes import hex_of, make_blob

BLOB = make_blob(layer_bytes=2**16)
KEY = hex_of(BLOB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _cache(folder: Path, bytes_max: int = 2**30) -> DiskCache:
    return DiskCache(folder, bytes_max=bytes_max)


def _fill(cache: DiskCache, blob: bytes) -> None:
    assert cache.reserve(len(blob))
    partial = cache.new_partial(len(blob))
    partial.file.write(memoryview(blob), 0)
    cache.admit(hex_of(blob), partial)
    partial.file.close()


def _content(cache: DiskCache, key: str) -> bytes | None:
    cached = cache.open(key)
    if cached is None:
        return None
    assert cached.is_verified
    data = cached.file.read(0, cached.size_bytes)
    cached.file.close()
    return data


def test_what_was_admitted_is_opened(folder: Path) -> None:
    cache = _cache(folder)
    _fill(cache, BLOB)
    assert _content(cache, KEY) == BLOB
    assert cache.size_bytes == len(BLOB)


def test_a_link_in_place_of_a_blob_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(BLOB)
    cache = _cache(folder)
    _fill(cache, BLOB)
    (folder / KEY).unlink()
    (folder / KEY).symlink_to(tmp_path / "secret")
    assert cache.open(KEY) is None
    assert not (folder / KEY).is_symlink()
    assert (tmp_path / "secret").read_bytes() == BLOB


def test_links_that_are_there_at_the_start_are_not_taken_over(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (tmp_path / "secret").write_bytes(BLOB)
    (folder / KEY).symlink_to(tmp_path / "secret")
    (folder / ".partial-0").symlink_to(tmp_path / "secret")
    cache = _cache(folder)
    assert cache.open(KEY) is None
    assert cache.size_bytes == 0
    assert (tmp_path / "secret").exists()


def test_a_blob_takes_the_place_of_a_link_and_not_of_its_target(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"keep me")
    cache = _cache(folder)
    (folder / KEY).symlink_to(tmp_path / "secret")
    _fill(cache, BLOB)
    assert _content(cache, KEY) == BLOB
    assert (tmp_path / "secret").read_bytes() == b"keep me"


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_never_opened(folder: Path, plant: object) -> None:
    cache = _cache(folder)
    _fill(cache, BLOB)
    (folder / KEY).unlink()
    plant(folder / KEY)  # type: ignore[operator]
    assert cache.open(KEY) is None


def test_a_file_that_was_touched_must_be_checked_again(folder: Path) -> None:
    cache = _cache(folder)
    _fill(cache, BLOB)
    os.utime(folder / KEY, ns=(1, 1))
    cached = cache.open(KEY)
    assert cached is not None
    assert not cached.is_verified
    cache.trust(KEY, cached.file)
    assert _content(cache, KEY) == BLOB


def test_files_of_an_earlier_process_must_be_checked(folder: Path) -> None:
    _fill(_cache(folder), BLOB)
    cached = _cache(folder).open(KEY)
    assert cached is not None
    assert not cached.is_verified


def test_partial_files_of_a_dead_process_are_deleted_and_those_in_use_are_not(folder: Path) -> None:
    _cache(folder)
    (folder / ".partial-left").write_bytes(b"x")
    with (folder / ".partial-used").open("wb") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        _cache(folder)
        assert [path.name for path in folder.iterdir()] == [".partial-used"]


def test_what_is_being_filled_counts(folder: Path) -> None:
    cache = _cache(folder, bytes_max=2 * len(BLOB))
    _fill(cache, BLOB)
    assert cache.reserve(len(BLOB))
    assert cache.size_bytes == 2 * len(BLOB)
    assert _content(cache, KEY) == BLOB
    assert cache.reserve(len(BLOB))  # which pushes out the blob
    assert cache.open(KEY) is None
    assert not cache.reserve(1)
    partial = cache.new_partial(len(BLOB))
    partial.file.close()
    cache.abandon(partial)
    assert cache.reserve(1)


def test_a_blob_that_cannot_be_kept_gives_its_room_back(folder: Path) -> None:
    cache = _cache(folder)
    (folder / KEY).mkdir()  # no file can take its place
    _fill(cache, BLOB)
    assert cache.size_bytes == 0
    assert cache.open(KEY) is None
    assert [path.name for path in folder.iterdir()] == [KEY]


def test_a_folder_that_was_deleted_is_made_again(folder: Path) -> None:
    cache = _cache(folder)
    folder.rmdir()
    _fill(cache, BLOB)
    assert _content(cache, KEY) == BLOB


def test_what_the_kernel_has_in_memory_is_read_at_once(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    file = OpenFile(fd)
    file.write(memoryview(BLOB), 0)
    buffer = memoryview(bytearray(1000))
    assert file.read_at_once(buffer, 5) == 1000
    assert buffer == BLOB[5:1005]
    assert file.read_at_once(buffer, len(BLOB)) == 0
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.read_at_once(buffer, 0)


def test_what_only_the_disk_has_is_not_read_at_once(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    file = OpenFile(fd)
    file.write(memoryview(BLOB), 0)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = memoryview(bytearray(1000))
    if file.read_at_once(buffer, 0):
        pytest.skip("this file system keeps everything in memory")
    assert file.read(0, 1000) == BLOB[:1000]
    assert file.read_at_once(buffer, 0) == 1000
    assert buffer == BLOB[:1000]


def test_a_file_is_closed_when_its_last_user_is_done(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    file = OpenFile(fd)
    inside, done = threading.Event(), threading.Event()

    def use() -> None:
        with file.used():
            inside.set()
            done.wait(5)

    user = threading.Thread(target=use)
    user.start()
    inside.wait(5)
    file.close()
    os.fstat(fd)  # still open
    done.set()
    user.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(OSError, match="closed"):
        file.read(0, 1)
