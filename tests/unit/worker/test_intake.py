"""An adapter's bytes on their way into the engine."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.adapter_container import ContainerError, ContainerHeader
from services.core.types import Adapter, AdapterDigest
from services.worker.intake import COPIES_MAX, PARTS_MAX, ArrivingBytes, Intake, parts
from tests.support.worker_peers import Blob, make_blob

LAYERS = 8
BLOB = make_blob(7, layers=LAYERS)


class _Engine:
    """Reads every byte that it is told of, as a real one may."""

    def __init__(self, blob: Blob) -> None:
        self._expected = blob.data
        self._header: ContainerHeader | None = None
        self._payload = memoryview(b"")
        self.layers: list[int] = []
        self.threads: set[str] = set()

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        assert digest == BLOB.digest
        assert blocks == (7, 8)
        self._header, self._payload = header, payload

    def extend_adapter(self, digest: str, layers: int) -> None:
        header = self._header
        assert header is not None
        self.threads.add(threading.current_thread().name)
        end = header.payload_bytes if layers == LAYERS else header.layers[layers].offset
        start = header.payload_offset
        assert self._payload[:end] == self._expected[start : start + end]
        self.layers.append(layers)


def _intake(into: bytearray, engine: _Engine, told: list[int]) -> Intake:
    adapter = Adapter(AdapterDigest(BLOB.digest), BLOB.rank, len(BLOB.data))
    return Intake(
        adapter,
        memoryview(into),
        blocks=(7, 8),
        engine=engine,
        num_layers=LAYERS,
        parts_max=PARTS_MAX,
        on_layers=told.append,
    )


@given(st.lists(st.integers(1, len(BLOB.data)), max_size=40))
def test_the_engine_gets_layers_in_few_parts_and_only_whole_ones(ends: list[int]) -> None:
    into, engine, told = bytearray(len(BLOB.data)), _Engine(BLOB), list[int]()
    intake = _intake(into, engine, told)
    for end in [*sorted(ends), len(BLOB.data)]:
        into[:end] = BLOB.data[:end]
        intake.take(end)
    intake.check_is_complete()
    assert engine.layers == sorted(set(engine.layers))
    assert set(engine.layers) <= set(parts(LAYERS, PARTS_MAX))
    assert engine.layers == [*told, LAYERS]


def test_layers_are_handed_on_long_before_the_last_byte() -> None:
    into, engine, told = bytearray(BLOB.data), _Engine(BLOB), list[int]()
    intake = _intake(into, engine, told)
    for end in range(0, len(BLOB.data), 64):
        intake.take(end)
    assert told == [1, 2, 3, 4, 6, 7]
    with pytest.raises(ContainerError):
        intake.check_is_complete()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_nothing_that_is_wrong_reaches_the_engine(share: float) -> None:
    into, engine = bytearray(BLOB.data), _Engine(BLOB)
    into[int(share * len(into))] ^= 1
    with pytest.raises(ContainerError):
        _intake(into, engine, []).take(len(into))
    assert LAYERS not in engine.layers


def test_a_header_of_another_size_than_was_promised_is_refused() -> None:
    into, engine = bytearray(BLOB.data), _Engine(BLOB)
    adapter = Adapter(AdapterDigest(BLOB.digest), BLOB.rank, len(into) + 1)
    intake = Intake(
        adapter,
        memoryview(into),
        blocks=(7, 8),
        engine=engine,
        num_layers=LAYERS,
        parts_max=PARTS_MAX,
        on_layers=lambda _: None,
    )
    with pytest.raises(ContainerError, match="were promised"):
        intake.take(len(into))
    assert not intake.has_begun


async def test_bytes_are_verified_on_a_thread_behind_the_ones_that_come() -> None:
    into, engine, told = bytearray(len(BLOB.data)), _Engine(BLOB), list[int]()
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as executor:
        arriving = ArrivingBytes(_intake(into, engine, told), executor)
        for end in range(100, len(into), 100):
            into[:end] = BLOB.data[:end]
            arriving.note(end)
            await asyncio.sleep(0)
        into[:] = BLOB.data
        arriving.note(len(into))
        await arriving.finish()
    assert engine.layers[-1] == LAYERS
    assert {name.split("_")[0] for name in engine.threads} == {"loader"}


async def test_whoever_brings_more_bytes_learns_that_the_first_were_wrong() -> None:
    into, engine = bytearray(len(BLOB.data)), _Engine(BLOB)
    with ThreadPoolExecutor(1) as executor:
        arriving = ArrivingBytes(_intake(into, engine, []), executor)
        arriving.note(200)
        await arriving.settle()
        with pytest.raises(ContainerError):
            arriving.note(300)
        with pytest.raises(ContainerError):
            await arriving.finish()


def test_every_number_of_layers_has_its_parts() -> None:
    assert [parts(n, COPIES_MAX) for n in (1, 2, 5, 30)] == [
        [1],
        [1, 2],
        [1, 3, 5],
        [5, 15, 26, 30],
    ]
    assert parts(30, PARTS_MAX) == [2, 5, 10, 15, 21, 26, 29, 30]
    assert parts(30, 1) == [30]
