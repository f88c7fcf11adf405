"""The link of the cold-start benchmark, and what it says of a load."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from bench.coldstart.client import Answer
from bench.coldstart.cpu import cpu_s
from bench.coldstart.link import Link, running_link
from bench.coldstart.turns import Round, Seen

SIZE_BYTES = 2_000_000
DATA = bytes(range(250)) * (SIZE_BYTES // 250)


@contextmanager
def _sender() -> Generator[str]:
    """A server that answers each connection's first byte with `DATA`, and ends it."""

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(1)
            connection.sendall(DATA)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield "{}:{}".format(*server.getsockname())


def _ask(address: str) -> tuple[bytes, float, float]:
    """What came, when its first byte came and when its last, in seconds."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        began_s = time.perf_counter()
        connection.sendall(b"?")
        data = connection.recv(1)
        first_s = time.perf_counter() - began_s
        while part := connection.recv(2**16):
            data += part
    return data, first_s, time.perf_counter() - began_s


def test_a_link_passes_everything_no_sooner_than_it_may() -> None:
    with _sender() as target, running_link(Link("slow", 4e6, 0.1), target) as link:
        data, first_s, last_s = _ask(link.address)
    assert data == DATA
    assert first_s >= 0.1
    assert last_s >= 0.1 + SIZE_BYTES / 4e6


def test_connections_share_the_rate_of_a_link() -> None:
    ends_s: list[float] = []
    with _sender() as target, running_link(Link("slow", 8e6, 0.0), target) as link:

        def ask() -> None:
            ends_s.append(_ask(link.address)[2])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(ends_s) >= 0.9 * 2 * SIZE_BYTES / 8e6


def test_a_link_is_a_process_whose_cpu_time_is_known() -> None:
    with _sender() as target, running_link(Link("any", 1e9, 0.0), target) as link:
        before_s = cpu_s(link.pid)
        for _ in range(50):
            _ask(link.address)
        assert 0.0 < cpu_s(link.pid) - before_s < 60.0


@pytest.mark.parametrize(("cold_ttft_s", "hidden"), [(1.0, 1.0), (1.5, 0.5), (2.0, 0.0)])
def test_hidden_is_what_of_a_load_does_not_delay_the_first_token(
    cold_ttft_s: float, hidden: float
) -> None:
    load = {"wait_s": 0.25, "download_s": 0.5, "engine_s": 0.25}
    found = Round(
        short_cold=Seen(_answer(1.1), load, {"worker": 3.0}),
        short_warm=Seen(_answer(0.1), None, {"worker": 1.0}),
        cold=Seen(_answer(cold_ttft_s), load, {}),
        warm=Seen(_answer(1.0), None, {}),
        host=None,
    )
    assert found.hidden == pytest.approx(hidden)
    assert found.load_cpu_s == {"worker": 2.0}


def _answer(ttft_s: float) -> Answer:
    return Answer("store", ttft_s, queue_s=0.0, load_s=0.0, prefill_s=0.0, token_times_s=[ttft_s])
