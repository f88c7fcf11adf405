"""What comes from object storage, checked and written in few and large steps.

A reader waits for whole layers, so a step is worth its way to a thread and back when it completes
one, or when so much is held that holding more would only cost memory. A step writes first and then
checks, so that what counts as verified is in the file.
"""

from bisect import bisect_right
from typing import Final

from services.adapter_store.disk_cache import OpenFile
from services.common.adapter_container import BlobVerifier, ContainerError

STEP_BYTES_MAX: Final = 2**20  # and the last chunk


class Intake:
    """The bytes of one blob, in order. `size_bytes`: what storage says the object has."""

    def __init__(self, digest: str, file: OpenFile, *, size_bytes: int) -> None:
        self._verifier = BlobVerifier(digest)
        self._file = file
        self._size_bytes = size_bytes
        self._held: list[memoryview] = []
        self._held_bytes = 0
        self._taken_bytes = 0
        self._layer_ends: list[int] = []  # known once the front is verified

    @property
    def verified_bytes(self) -> int:
        """How many bytes from the beginning are right, and in the file."""
        return self._verifier.verified_bytes

    @property
    def total_bytes(self) -> int | None:
        """Known once the front is verified."""
        header = self._verifier.header
        return None if header is None else header.total_bytes

    def hold(self, chunks: list[memoryview]) -> None:
        """Bytes that have come and will be taken by the next step."""
        self._held += chunks
        self._held_bytes += sum(map(len, chunks))

    def is_worth_a_step(self) -> bool:
        """Whether taking what is held now may give readers something, or must not wait longer."""
        if not self._layer_ends or self._held_bytes >= STEP_BYTES_MAX:
            return True
        index = bisect_right(self._layer_ends, self._taken_bytes)
        ends = self._layer_ends[index : index + 1]
        return not ends or self._taken_bytes + self._held_bytes >= ends[0]

    def take(self) -> None:
        """Write and check what is held. It blocks. Raises OSError and ContainerError."""
        chunks, self._held, self._held_bytes = self._held, [], 0
        for chunk in chunks:
            self._file.write(chunk, self._taken_bytes)
            self._taken_bytes += len(chunk)
            self._verifier.feed(chunk)
        header = self._verifier.header
        if header is None or self._layer_ends:
            return
        if header.total_bytes != self._size_bytes:
            raise ContainerError(f"{self._size_bytes} bytes instead of {header.total_bytes}")
        front_bytes = header.payload_offset
        self._layer_ends = [front_bytes + c.offset + c.size_bytes for c in header.layers]

    def check_complete(self) -> None:
        """Raises ContainerError unless all of the blob has been taken and is right."""
        if not self._verifier.is_complete:
            raise ContainerError(
                f"the object ends after {self._taken_bytes + self._held_bytes} bytes"
            )
