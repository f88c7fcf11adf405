import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.adapter_store import ranges
from services.adapter_store.ranges import ReadAhead, read_object
from services.adapter_store.retry_budget import SAVED_RETRIES_MAX, RetryBudget
from services.adapter_store.storage import (
    ObjectChangedError,
    ObjectInfo,
    ObjectStorage,
    S3Credentials,
    StorageRefusedError,
    Timeouts,
    open_storage,
    unavailable,
)
from services.common.errors import Reason, RpcError
from tests.support.fault_proxy import http

DATA = bytes(range(256)) * 1024


@pytest.fixture
def storage(tmp_path: Path) -> ObjectStorage:
    return open_storage((tmp_path / "store").as_uri(), Timeouts())


async def _info(storage: ObjectStorage, path: str) -> ObjectInfo:
    info = await storage.head(path)
    assert info is not None
    return info


async def _read(storage: ObjectStorage, info: ObjectInfo, start: int, stop: int) -> bytes:
    parts = [bytes(part) async for part in storage.read_range(info, start=start, stop=stop)]
    return b"".join(parts)


async def test_a_range_is_read_as_asked(storage: ObjectStorage) -> None:
    await storage.put("x", DATA)
    info = await _info(storage, "x")
    assert info.size_bytes == len(DATA)
    for start, stop in ((0, 1), (0, len(DATA)), (1000, 2000), (len(DATA) - 1, len(DATA))):
        assert await _read(storage, info, start, stop) == DATA[start:stop]


async def test_a_range_of_an_object_that_was_replaced_is_refused(storage: ObjectStorage) -> None:
    await storage.put("x", DATA)
    info = await _info(storage, "x")
    await storage.put("x", DATA[:-1])
    with pytest.raises(ObjectChangedError):
        await _read(storage, info, 0, 10)


async def test_a_range_of_an_object_that_is_gone_is_not_found(storage: ObjectStorage) -> None:
    await storage.put("x", DATA)
    info = await _info(storage, "x")
    await storage.delete("x")
    with pytest.raises(FileNotFoundError):
        await _read(storage, info, 0, 10)


async def test_storage_that_does_not_answer_in_time_is_unavailable(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("services.adapter_store.storage.obstore.head_async", never)
    slow = ObjectStorage(storage._store, Timeouts(call_s=0.05))
    with pytest.raises(RpcError) as caught:
        await slow.head("x")
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert isinstance(caught.value.__cause__, TimeoutError)


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


async def test_names_of_objects_are_as_written(storage: ObjectStorage) -> None:
    await storage.put("x/a", b"1")
    assert [info.path for info in await storage.list("x")] == ["x/a"]
    assert isinstance((await storage.list("x"))[0], ObjectInfo)


class RangedStorage(ObjectStorage):
    """Keeps which ranges are asked for, counts those that are read at a time, can fail at one."""

    ranges_max = 4
    running = 0
    most = 0
    fail_at: int | None = None
    asked: list[tuple[int, int]]

    async def read_range(
        self, info: ObjectInfo, *, start: int, stop: int
    ) -> AsyncGenerator[memoryview]:
        self.asked.append((start, stop))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            if start == self.fail_at:
                raise unavailable("broken")
            async for part in super().read_range(info, start=start, stop=stop):
                yield part
        finally:
            self.running -= 1


@pytest.fixture
def ranged(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> RangedStorage:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    ranged = RangedStorage(storage._store, Timeouts())
    ranged.ranges_max, ranged.asked = 4, []
    return ranged


async def test_ranges_are_read_ahead_and_come_in_order(ranged: RangedStorage) -> None:
    await ranged.put("x", DATA[:20_500])
    read_ahead = ReadAhead(2)
    got = bytearray()
    await _collect(read_object(ranged, await _info(ranged, "x"), read_ahead), got)
    assert got == DATA[:20_500]
    assert ranged.most == 3  # one of its own and those two
    assert read_ahead.take()
    assert read_ahead.take()  # all were given back
    assert not read_ahead.take()


async def test_the_first_ranges_are_smaller_when_several_are_read_at_a_time(
    ranged: RangedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FIRST_RANGE_BYTES", 300)
    await ranged.put("x", DATA[:4000])
    info = await _info(ranged, "x")
    for ranges_max, asked in (
        (4, [(0, 300), (300, 600), (600, 1200), (1200, 2200), (2200, 3200), (3200, 4000)]),
        (1, [(0, 1000), (1000, 2000), (2000, 3000), (3000, 4000)]),
    ):
        ranged.ranges_max, ranged.asked = ranges_max, []
        got = bytearray()
        await _collect(read_object(ranged, info, ReadAhead(3)), got)
        assert got == DATA[:4000]
        assert ranged.asked == asked


async def test_a_failing_range_ends_the_object_and_gives_back_what_it_took(
    ranged: RangedStorage,
) -> None:
    await ranged.put("x", DATA[:20_500])
    ranged.fail_at = 2000
    read_ahead = ReadAhead(2)
    got = bytearray()
    with pytest.raises(RpcError):
        await _collect(read_object(ranged, await _info(ranged, "x"), read_ahead), got)
    assert got == DATA[:2000]
    assert ranged.running == 0
    assert read_ahead.take()
    assert read_ahead.take()


async def _collect(parts: AsyncGenerator[list[memoryview]], got: bytearray) -> None:
    async for chunks in parts:
        for chunk in chunks:
            got += chunk


def test_retries_are_a_share_of_reads_with_a_floor() -> None:
    now_s = 0.0
    budget = RetryBudget(clock=lambda: now_s)
    assert _taken(budget) == SAVED_RETRIES_MAX
    for _ in range(10):
        budget.note_read()
    assert _taken(budget) == 2
    now_s = 3.0
    assert _taken(budget) == 3
    now_s = 1e6
    assert _taken(budget) == SAVED_RETRIES_MAX


def _taken(budget: RetryBudget) -> int:
    return sum(budget.take() for _ in range(1000))


class Answers:
    """An S3 that gives each request the next of some answers, and keeps what it was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.left = list(answers)
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.left.pop(0) if len(self.left) > 1 else self.left[0])
        await writer.drain()
        writer.close()


@asynccontextmanager
async def _s3(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, host: str = "127.0.0.1"
) -> AsyncGenerator[ObjectStorage]:
    server = await asyncio.start_server(answers.serve, host, 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    async with server:
        yield open_storage("s3://b", Timeouts(call_s=5), s3=S3Credentials("key", "secret"))


@pytest.mark.parametrize("status", ["500 Oops", "503 Slow Down", "429 Too Many Requests"])
async def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    answers = Answers(http(status), http("404 Not Found"))
    async with _s3(answers, monkeypatch) as storage:
        assert await storage.get("x") is None
    assert len(answers.requests) == 2


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "400 Bad Request"])
async def test_a_refusal_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    answers = Answers(http(status))
    async with _s3(answers, monkeypatch) as storage:
        with pytest.raises(StorageRefusedError) as caught:
            await storage.get("x")
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert len(answers.requests) == 1


async def test_a_redirect_to_another_host_takes_no_credentials_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # obstore follows redirects and can't be told not to; what comes back is checked by digest.
    elsewhere = Answers(http("404 Not Found"))
    server = await asyncio.start_server(elsewhere.serve, "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    redirect = f"HTTP/1.1 307 T\r\nLocation: http://127.0.0.2:{port}/\r\nContent-Length: 0\r\n\r\n"
    async with server, _s3(Answers(redirect.encode()), monkeypatch) as storage:
        assert await storage.get("x") is None
    assert elsewhere.requests
    assert all(b"authorization" not in request.lower() for request in elsewhere.requests)
