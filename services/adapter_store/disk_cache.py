"""Blobs on local disk, by digest, within a number of bytes; the least recently used go first.

A file is trusted while it is the very file whose bytes were seen to have its digest: the same
inode, size and times. Files of an earlier process, and files that somebody has touched, are handed
out as `is_verified` = False, for `fills` to check before a byte of them is used. Names in the
folder are never followed when they are links. What is being filled counts (`reserve`), and is
locked: a partial file that nobody has locked was left behind by a crash.

All of it blocks: it is called from threads, several at a time.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

_PARTIAL_PREFIX: Final = ".partial-"
_HEX_DIGITS: Final = frozenset("0123456789abcdef")
_DIGEST_DIGITS: Final = 64
# O_NONBLOCK: a planted FIFO must not hold up a thread. It means nothing for files.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_AT_ONCE: Final = frozenset({errno.EAGAIN, errno.EOPNOTSUPP})
Identity = tuple[int, int, int, int, int]
_log = structlog.get_logger("cache")


class OpenFile:
    """A descriptor that threads read and write; it is closed when the last of them is done."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()  # over the two below
        self._users = 0
        self._is_closed = False

    @contextlib.contextmanager
    def used(self) -> Generator[int]:
        """The descriptor, which stays open meanwhile. OSError: it is closed already."""
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the file is closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset, fewer at the end. Raises OSError."""
        with self.used() as fd:
            return os.pread(fd, length, offset)

    def read_at_once(self, buffer: memoryview, offset: int) -> int:
        """Bytes that could be read into a buffer without waiting for the disk. Raises OSError.

        0: none, or the file system does not tell. The end of the file looks the same.
        """
        with self.used() as fd:
            try:
                return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno in _NOT_AT_ONCE:
                    return 0
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of it at an offset. Raises OSError."""
        with self.used() as fd:
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written

    def identity(self) -> Identity:
        """What changes when anybody touches the file. Raises OSError."""
        with self.used() as fd:
            status = os.fstat(fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def close(self) -> None:
        """Give the descriptor back; once is enough."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._close_if_unused()

    def __del__(self) -> None:
        """Close it, where a cancelled call has lost it."""
        self.close()

    def _close_if_unused(self) -> None:
        if self._is_closed and not self._users:
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class CachedBlob:
    """A blob's file. Not verified: no byte of it may be used before it has been checked."""

    file: OpenFile
    size_bytes: int
    is_verified: bool


@dataclass(frozen=True, slots=True)
class Partial:
    """A file to fill, and the room that is kept for it."""

    file: OpenFile
    name: str
    reserved_bytes: int


class DiskCache:
    """Blobs in a folder of this process's own."""

    def __init__(self, folder: Path, *, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._lock = threading.Lock()  # over the three below
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._verified: dict[str, Identity] = {}
        self._reserved_bytes = 0
        self._adopt()

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs and of what is being filled."""
        with self._lock:
            return sum(self._sizes.values()) + self._reserved_bytes

    def open(self, key: str) -> CachedBlob | None:
        """The blob's file, or None when there is none that can be opened."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
            known = self._verified.get(key)
        file = self._opened(key)
        if file is None:
            self.discard(key)
            return None
        identity = file.identity()
        return CachedBlob(file, size_bytes=identity[2], is_verified=identity == known)

    def trust(self, key: str, file: OpenFile) -> None:
        """Say that all bytes of an open file of this blob have been seen to be right."""
        identity = file.identity()
        with self._lock:
            if key in self._sizes:
                self._verified[key] = identity

    def reserve(self, size_bytes: int) -> bool:
        """Make room for a blob that is to be filled. False: others are being filled; ask later.

        A blob that is larger than the whole cache gets in when nothing else is being filled.
        """
        with self._lock:
            if self._reserved_bytes and self._reserved_bytes + size_bytes > self._bytes_max:
                return False
            self._reserved_bytes += size_bytes
            gone = self._surplus()
        self._delete(gone)
        return True

    def new_partial(self, reserved_bytes: int) -> Partial:
        """A file to fill and to `admit` or `abandon`. OSError: the reservation has ended."""
        name = f"{_PARTIAL_PREFIX}{secrets.token_hex(8)}"
        try:
            with self._opened_folder() as folder:
                fd = os.open(name, _NEW_FLAGS, 0o600, dir_fd=folder)
        except OSError:
            self._release(reserved_bytes)
            raise
        fcntl.flock(fd, fcntl.LOCK_EX)
        return Partial(OpenFile(fd), name, reserved_bytes)

    def admit(self, key: str, partial: Partial) -> None:
        """Keep a filled file whose bytes have the digest `key`. The file stays open.

        One that is larger than the cache is deleted, and so is one that can't be kept.
        """
        if partial.reserved_bytes > self._bytes_max:
            self.abandon(partial)
            return
        try:
            with self._opened_folder() as folder:
                os.replace(partial.name, key, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            _log.warning("blob_not_kept", digest=key, cause=str(error))
            self.abandon(partial)
            return
        identity = partial.file.identity()
        with self._lock:
            self._reserved_bytes -= partial.reserved_bytes
            self._sizes[key] = identity[2]
            self._sizes.move_to_end(key)
            self._verified[key] = identity
            gone = self._surplus()
        self._delete(gone)

    def abandon(self, partial: Partial) -> None:
        """Delete a file that will not be admitted; it stays open."""
        self._unlink(partial.name)
        self._release(partial.reserved_bytes)

    def discard(self, key: str) -> None:
        """Forget a blob; those who read it go on."""
        with self._lock:
            self._sizes.pop(key, None)
            self._verified.pop(key, None)
        self._unlink(key)

    def _adopt(self) -> None:
        """Take over what an earlier process left, oldest use first, but for its partial files."""
        found: list[tuple[float, str, int]] = []
        try:
            with self._opened_folder() as folder, os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(_PARTIAL_PREFIX):
                        self._delete_if_left(entry.name)
                    elif _is_key(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_atime, entry.name, status.st_size))
        except OSError as error:  # what is asked for fails until somebody has mended it
            _log.warning("cache_folder_unusable", folder=str(self._folder), cause=str(error))
        with self._lock:
            self._sizes.update((name, size_bytes) for _, name, size_bytes in sorted(found))
            gone = self._surplus()
        self._delete(gone)

    def _delete_if_left(self, name: str) -> None:
        file = self._opened(name)
        if file is None:
            return
        try:
            with file.used() as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process fills it
        finally:
            file.close()
        _log.info("leftover_deleted", file=name)
        self._unlink(name)

    def _release(self, reserved_bytes: int) -> None:
        with self._lock:
            self._reserved_bytes -= reserved_bytes

    def _surplus(self) -> list[str]:
        """Forget the least recently used blobs that do not fit. The caller holds the lock."""
        gone: list[str] = []
        total_bytes = sum(self._sizes.values()) + self._reserved_bytes
        while self._sizes and total_bytes > self._bytes_max:
            key, size_bytes = self._sizes.popitem(last=False)
            self._verified.pop(key, None)
            total_bytes -= size_bytes
            gone.append(key)
        return gone

    def _delete(self, keys: list[str]) -> None:
        for key in keys:
            self._unlink(key)

    def _unlink(self, name: str) -> None:
        """A file that can't be deleted now is found again by the next process."""
        try:
            with self._opened_folder() as folder:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("cache_file_kept", file=name, cause=str(error))

    def _opened(self, name: str) -> OpenFile | None:
        """A regular file, or None for anything else."""
        try:
            with self._opened_folder() as folder:
                fd = os.open(name, _READ_FLAGS, dir_fd=folder)
        except OSError:
            return None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return OpenFile(fd)
        os.close(fd)
        return None

    @contextlib.contextmanager
    def _opened_folder(self) -> Generator[int]:
        """The folder, made again when somebody has deleted it."""
        try:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)


def _is_key(name: str) -> bool:
    return len(name) == _DIGEST_DIGITS and _HEX_DIGITS.issuperset(name)
