"""A blob on its way to the disk, and those who read it while it comes.

What may be handed on is what lies before `verified_bytes`. A reader begins at any offset, at any
time, waits for what is not there yet, and leaves when it likes. The files that the bytes lie in
stay open until the one who fills and all who read have left.
"""

import asyncio

from services.adapter_store.disk_cache import OpenFile


class Pulse:
    """Wakes all who wait for the next change. Take `event` first, then look, then wait for it."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def fire(self) -> None:
        """Something has changed."""
        self.event.set()
        self.event = asyncio.Event()


class Arrival:
    """How far a blob has come. `total_bytes` is known once its front has been verified."""

    def __init__(self) -> None:
        self.file: OpenFile | None = None
        self.total_bytes: int | None = None
        self.verified_bytes = 0
        self.error: BaseException | None = None  # why no more will come
        self.changed = Pulse()
        self._files: list[OpenFile] = []
        self._users = 0

    @classmethod
    def complete(cls, file: OpenFile, size_bytes: int) -> "Arrival":
        """A blob that is all there and right."""
        arrival = cls()
        arrival.begin(file)
        arrival.advance(size_bytes, total_bytes=size_bytes)
        return arrival

    def begin(self, file: OpenFile) -> None:
        """The bytes come into this file, from its beginning."""
        self._files.append(file)
        self.file = file
        self.verified_bytes = 0

    def advance(self, verified_bytes: int, *, total_bytes: int | None) -> None:
        """More may be handed on."""
        if verified_bytes != self.verified_bytes:
            self.verified_bytes, self.total_bytes = verified_bytes, total_bytes
            self.changed.fire()

    def end(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        self.error = error
        self.changed.fire()

    def join(self) -> None:
        """Keep its files open until `leave`."""
        self._users += 1

    def leave(self) -> None:
        """The last one closes the files."""
        self._users -= 1
        if not self._users:
            for file in self._files:
                file.close()
