"""Reading a large object fast and whole: several ranges at a time, handed on in order.

One connection to object storage rarely fills the line, so the ranges behind the one that is being
handed on are read ahead. A range that breaks goes on alone where it broke, after a pause, as long
as tries bring something and the process's `RetryBudget` allows. What is read ahead is bounded: an
object always has one range of its own, so that no slow object holds up another, and takes further
ones from a number that the whole process has (`ReadAhead`).
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from services.adapter_store.storage import (
    ObjectChangedError,
    ObjectInfo,
    Storage,
    StorageRefusedError,
    unavailable,
)
from services.common.clients import Backoff
from services.common.errors import RpcError

RANGE_BYTES: Final = 8 * 2**20
FIRST_RANGE_BYTES: Final = 4 * 2**20
FRUITLESS_TRIES_MAX: Final = 4  # of one range, in a row


class ReadAhead:
    """How many ranges all objects together may read ahead."""

    def __init__(self, ranges: int) -> None:
        self._free = ranges

    def take(self) -> bool:
        """Take one, if one is left."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """Return one that was taken."""
        self._free += 1


async def read_object(
    storage: Storage, info: ObjectInfo, read_ahead: ReadAhead
) -> AsyncGenerator[list[memoryview]]:
    """All bytes of an object, in order; each time all that has come since the time before.

    Raises FileNotFoundError, ObjectChangedError, and OBJECT_STORAGE_UNAVAILABLE when it gives up.
    """
    wanted = _ranges(info.size_bytes, is_alone=storage.ranges_max == 1)
    held: deque[_Range] = deque()  # all but the first were taken from `read_ahead`
    try:
        while wanted or held:
            while wanted and len(held) < storage.ranges_max and (not held or read_ahead.take()):
                held.append(_Range(storage, info, *wanted.popleft()))
            async for chunks in held[0].chunks():
                yield chunks
            held.popleft()
            if held:
                read_ahead.give_back()
    finally:
        for _ in range(len(held) - 1):
            read_ahead.give_back()
        await asyncio.gather(*(each.close() for each in held))


def _ranges(size_bytes: int, *, is_alone: bool) -> deque[tuple[int, int]]:
    """Start and end of each range. The first ones are smaller when several are read at a time.

    They share the line, so the first one's bytes, which are handed on first, come at a fraction of
    its rate until it ends.
    """
    ranges: deque[tuple[int, int]] = deque()
    start = 0
    while start < size_bytes:
        length = RANGE_BYTES if is_alone else min(RANGE_BYTES, max(FIRST_RANGE_BYTES, start))
        ranges.append((start, min(start + length, size_bytes)))
        start += length
    return ranges


class _Range:
    """A range that is read into memory while it is waited for."""

    def __init__(self, storage: Storage, info: ObjectInfo, start: int, stop: int) -> None:
        self._chunks: list[memoryview] = []  # read and not yet taken
        self._error: Exception | None = None
        self._is_complete = False
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read(_resumed(storage, info, start, stop)))

    async def chunks(self) -> AsyncGenerator[list[memoryview]]:
        """What has been read, and what comes."""
        while True:
            chunks, self._chunks = self._chunks, []
            if chunks:
                yield chunks
            elif self._error is not None:
                raise self._error
            elif self._is_complete:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        """Stop reading."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, source: AsyncGenerator[memoryview]) -> None:
        try:
            async with aclosing(source) as chunks:
                async for chunk in chunks:
                    self._chunks.append(chunk)
                    self._changed.set()
        except Exception as error:  # noqa: BLE001 - raised again where the chunks are waited for
            self._error = error
        self._is_complete = self._error is None
        self._changed.set()


async def _resumed(
    storage: Storage, info: ObjectInfo, start: int, stop: int
) -> AsyncGenerator[memoryview]:
    """One range; a try goes on where the one before broke."""
    storage.retries.note_read()
    backoff = Backoff(base_s=0.1, cap_s=2.0)
    fruitless_tries = 0
    while True:
        tried_at = start
        try:
            async with aclosing(storage.read_range(info, start=start, stop=stop)) as chunks:
                async for chunk in chunks:
                    start += len(chunk)
                    yield chunk
            if start >= stop:
                return
            failure = unavailable("the range ended before its end")
        except (ObjectChangedError, StorageRefusedError):
            raise
        except RpcError as error:
            failure = error
        if start >= stop:
            return
        if start > tried_at:
            fruitless_tries = 0
            backoff.reset()
        fruitless_tries += 1
        if fruitless_tries == FRUITLESS_TRIES_MAX or not storage.retries.take():
            raise failure
        await asyncio.sleep(backoff.next_delay_s())
