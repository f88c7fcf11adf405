"""Blobs on local disk, by digest, within a number of bytes; the least recently used go first.

Hands out a file only after its bytes were seen to have its digest. All of it blocks: `blobs` calls
it from threads, several at a time.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO, BinaryIO, Final

import structlog

_PARTIAL_PREFIX: Final = ".partial-"
_PARTIAL_AGE_MAX_S: Final = 3600.0  # older ones were left behind by a crash
_READ_BYTES: Final = 2**20
_HEX_DIGITS: Final = 64
_log = structlog.get_logger("cache")


class DiskCache:
    """Verified blobs in a folder of this process's own."""

    def __init__(self, folder: Path, *, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._lock = threading.Lock()  # over the two below
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._verified: set[str] = set()  # files of an earlier process are verified at first use
        folder.mkdir(parents=True, exist_ok=True)
        self._adopt()

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs."""
        with self._lock:
            return sum(self._sizes.values())

    def open(self, key: str) -> BinaryIO | None:
        """The blob's file, or None when there is none that has its digest."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
            verified = key in self._verified
        try:
            file = (self._folder / key).open("rb")
        except FileNotFoundError:
            self.discard(key)
            return None
        if not verified and not self._verify(key, file):
            file.close()
            return None
        return file

    def new_partial(self) -> IO[bytes]:
        """A file to fill and to `admit` or `abandon`."""
        return tempfile.NamedTemporaryFile(dir=self._folder, prefix=_PARTIAL_PREFIX, delete=False)

    def admit(self, key: str, partial: IO[bytes]) -> None:
        """Take over a filled file whose bytes have the digest `key`."""
        size_bytes = partial.tell()
        partial.close()
        Path(partial.name).replace(self._folder / key)
        with self._lock:
            self._sizes[key] = size_bytes
            self._sizes.move_to_end(key)
            self._verified.add(key)
        self._evict()

    def abandon(self, partial: IO[bytes]) -> None:
        """Delete a file that will not be filled."""
        partial.close()
        Path(partial.name).unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Forget a blob; those who read it go on."""
        with self._lock:
            self._sizes.pop(key, None)
            self._verified.discard(key)
        (self._folder / key).unlink(missing_ok=True)

    def _adopt(self) -> None:
        """Take over what an earlier process left, oldest use first."""
        found: list[tuple[float, str, int]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.name.startswith(_PARTIAL_PREFIX):
                    if time.time() - status.st_mtime > _PARTIAL_AGE_MAX_S:
                        path.unlink()
                elif len(path.name) == _HEX_DIGITS and path.is_file() and not path.is_symlink():
                    found.append((status.st_atime, path.name, status.st_size))
        self._sizes.update((name, size_bytes) for _, name, size_bytes in sorted(found))
        self._evict()

    def _verify(self, key: str, file: BinaryIO) -> bool:
        digest = hashlib.sha256()
        while data := file.read(_READ_BYTES):
            digest.update(data)
        if digest.hexdigest() != key:
            _log.warning("cache_file_damaged", digest=key)
            self.discard(key)
            return False
        with self._lock:
            self._verified.add(key)
        file.seek(0, os.SEEK_SET)
        return True

    def _evict(self) -> None:
        """The newest stays, even when it alone is over the limit: somebody waits for it."""
        with self._lock:
            total = sum(self._sizes.values())
            gone: list[str] = []
            for key, size_bytes in list(self._sizes.items())[:-1]:
                if total <= self._bytes_max:
                    break
                total -= size_bytes
                gone.append(key)
        for key in gone:
            self.discard(key)
