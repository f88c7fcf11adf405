"""A registry of 100,000 adapters: what names, pages and watches of it cost, and whose memory.

A real adapter store on a folder, as a process. One adapter is published; the others are documents
of the registry's own format beside it, of two versions each, with an alias and a canary. The times
of names are those of a gateway's registry in this process, for names drawn from all adapters, so
that hardly one is drawn twice. Memory is what the operating system says of each process, once with
the one adapter and once with all; the worker has an adapter pinned in both.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench.registry import measures
from bench.registry.corpus import write_adapters
from bench.registry.processes import ServiceProcess, service
from bench.report import Report, Row, Target
from bench.suite import ADAPTERS_DIR, free_port_base
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.entries import Weights
from services.adapter_store.service import SERVICE
from services.common.healthcheck import is_serving

ADAPTERS: Final = 100_000
ADAPTERS_QUICK: Final = 10_000
EXAMPLE: Final = "sentiment"
RESOLVE_US_MAX: Final = 50.0
PAGE_MS_MAX: Final = 100.0
WORKER_BYTES_MAX: Final = 5 * 2**20
_SETTLE_S: Final = 2.0


def run(*, quick: bool) -> Report:
    """Measure one adapter, then all of them."""
    count = ADAPTERS_QUICK if quick else ADAPTERS
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        without = _without(home)
        document_bytes = write_adapters(home / "store", count, without.shared)
        with _store(home, "all") as (store, address, start_s):
            resolve, first = asyncio.run(
                measures.resolving(address, count, questions=2_000 if quick else 20_000)
            )
            pages = asyncio.run(measures.listing(address))
            watches = [first, *asyncio.run(measures.watching(address))]
            memory = _memory(store, address)
    start_row: Row = {
        "adapters": count + 1,
        "document_bytes": document_bytes / count,
        "store_start_s": start_s,
    }
    memory_rows = [_memory_row(name, without.memory[name], memory[name]) for name in memory]
    targets = [
        *(_resolve_target(row) for row in resolve if "asked" not in row["resolve"]),
        *(
            Target(f"List, {row['list']}, p99", PAGE_MS_MAX, row["p99_ms"], "ms", is_upper=True)
            for row in pages
        ),
        Target(
            "worker's memory with all adapters over one",
            WORKER_BYTES_MAX / 1e6,
            (memory["worker"] - without.memory["worker"]) / 1e6,
            "MB",
            is_upper=True,
        ),
    ]
    return Report([start_row, *resolve, *pages, *watches, *memory_rows], targets)


def _resolve_target(row: Row) -> Target:
    name = f"resolve {row['resolve']}, p50"
    return Target(name, RESOLVE_US_MAX, row["p50_us"], "us", is_upper=True)


@dataclass(frozen=True, slots=True)
class _Without:
    """The suite with one adapter: its weights, and bytes by service."""

    shared: Weights
    memory: Mapping[str, int]


def _without(home: Path) -> _Without:
    with _store(home, "one") as (store, address, _):
        version = asyncio.run(measures.publish(address, ADAPTERS_DIR / EXAMPLE, "published"))
        memory = _memory(store, address)
    return _Without(_weights(version), memory)


def _weights(version: pb.AdapterVersion) -> Weights:
    return Weights(
        digest=version.ref.digest,
        rank=version.ref.rank,
        size_bytes=version.ref.size_bytes,
        target_modules=tuple(version.target_modules),
        dtype=version.dtype,
        base_model=version.base_model,
        parameters=version.parameters,
    )


@contextlib.contextmanager
def _store(home: Path, cache: str) -> Generator[tuple[ServiceProcess, str, float]]:
    """A store that is ready, its address, and the seconds that took."""
    address = f"127.0.0.1:{free_port_base()}"
    began_s = time.monotonic()
    with service(
        "adapter_store",
        listen=address,
        store_url=(home / "store").as_uri(),
        cache_dir=home / cache,
        adapters_max=2 * ADAPTERS,
    ) as process:
        process.wait_until(partial(is_serving, address, SERVICE), "a store that is ready")
        yield process, address, time.monotonic() - began_s


def _memory(store: ServiceProcess, address: str) -> dict[str, int]:
    """Bytes of the store, and of a gateway and a worker that have just read all they want of it."""
    memory: dict[str, int] = {}
    peers = {"adapter_store": address, "scheduler": "127.0.0.1:1"}  # no scheduler is needed
    with service("gateway", listen="127.0.0.1:0", **peers) as gateway:
        gateway.wait_for("registry_synced")
        time.sleep(_SETTLE_S)
        memory["gateway"] = gateway.memory_bytes
    with service("worker", listen="127.0.0.1:0", engine="simulated", **peers) as worker:
        worker.wait_for("pins_changed")
        time.sleep(_SETTLE_S)
        memory["worker"] = worker.memory_bytes
    memory["adapter store"] = store.memory_bytes
    return memory


def _memory_row(name: str, one_bytes: int, all_bytes: int) -> Row:
    return {
        "memory": name,
        "one_adapter_mb": one_bytes / 1e6,
        "all_mb": all_bytes / 1e6,
        "more_mb": (all_bytes - one_bytes) / 1e6,
    }
