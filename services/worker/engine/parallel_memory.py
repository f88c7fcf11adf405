"""Memory that shard 0 writes and another shard's process reads: the rows of an adapter.

An anonymous file: it has no name that a crash could leave behind, counts against no limit of
/dev/shm, and goes with its last mapping. The other process gets its descriptor over a connection.
"""

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle


class SharedMemory:
    """`view`: zeroed memory of this process, which another one may have, too."""

    def __init__(self, size_bytes: int) -> None:
        """Raises MemoryError."""
        self._file = os.memfd_create("calumma-adapter", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, size_bytes)
            self.view = memoryview(mmap.mmap(self._file, size_bytes))
        except OSError as error:
            os.close(self._file)
            raise MemoryError(f"no {size_bytes} bytes can be shared: {error}") from error

    def send(self, connection: Connection, pid: int) -> None:
        """Let the process at the other end have it. Raises OSError."""
        send_handle(connection, self._file, pid)

    def settle(self) -> None:
        """Whoever is to have it has it."""
        os.close(self._file)


def receive(connection: Connection, size_bytes: int) -> memoryview:
    """What the other end sent. Raises EOFError and OSError."""
    file = recv_handle(connection)
    try:
        return memoryview(mmap.mmap(file, size_bytes))
    finally:
        os.close(file)
