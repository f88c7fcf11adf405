"""One name, 64 clients, everything at once: every answer is one that the name's history explains.

What the registry's documents say is the truth; clients note what they asked, when, and what came
back; the checker is offline and looks at nothing else.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as store_pb
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.documents import from_json
from services.common.errors import RpcError
from tests.support.lifecycle_history import Call, Kind, State, violations
from tests.support.lifecycle_parts import Clients, LifecycleParts, lifecycle_parts
from tests.support.suite_parts import LIMIT_S, ResidencyWatch

CLIENTS = 64
SECONDS = 7.0
NAME = "poet"
WEIGHTS = 10  # different ones that are published again and again
STALE_S = 0.2  # of the gateway's mirror; all services share one event loop with 64 clients
BURST_S = 1.0  # half of it changes come, half of it none do
SEED = int(os.environ.get("CALUMMA_FUZZ_SEED", "20"))


class _Client:
    """One of those who do something all the time."""

    def __init__(
        self, number: int, clients: Clients, *, folders: list[Path], digests: dict[int, str]
    ) -> None:
        self.number = number
        self.folders = folders
        self.digests = digests  # of all versions that were ever published
        self.dice = random.Random(f"{SEED}/{number}")
        self.clients = clients

    async def run(self, until_s: float, calls: list[Call]) -> None:
        acts, weights = zip(*_ACTS.items(), strict=True)
        while time.monotonic() < until_s:
            (act,) = self.dice.choices(acts, weights)
            if act in _CHANGES and time.monotonic() % BURST_S < BURST_S / 2:
                act = _generate  # what was not noticed in time is seen while nothing changes
            if (call := await act(self)) is not None:
                calls.append(call)
            await asyncio.sleep(self.dice.random() * 0.05)

    async def note(self, kind: Kind, selector: str, rpc: Any, version: int = 0) -> Call:
        """Make a call; an answer with an adapter or a version gives its revision or digest."""
        call = Call(self.number, kind, selector, time.time_ns(), 0, version)
        try:
            answer = await rpc
        except grpc.aio.AioRpcError as raised:
            error = RpcError.from_rpc(raised)
            if error is None:
                raise
            return replace(call, ended_ns=time.time_ns(), reason=error.reason)
        call = replace(call, ended_ns=time.time_ns())
        match answer:
            case store_pb.GetResponse():
                ref, revision = answer.version.ref, answer.adapter.revision
                return replace(call, version=ref.version, digest=ref.digest, revision=revision)
            case store_pb.PublishResponse():
                ref = answer.version.ref
                return replace(call, version=ref.version, digest=ref.digest)
            case store_pb.DeleteResponse():
                return call
            case _ if kind == "generate":
                assert len(answer.token_ids) == 6
                used = answer.adapter
                return replace(call, version=used.version, digest=used.digest)
            case _:
                return replace(call, revision=answer.adapter.revision)

    def version(self) -> int:
        """One of the last few, or one that may never be."""
        highest = max(self.digests, default=1)
        return max(1, highest - self.dice.randint(-1, 3))

    def selector(self) -> str:
        return self.dice.choice(["", "", "prod", "prod", str(self.version())])


async def _generate(client: _Client) -> Call:
    selector = client.selector()
    rpc = client.clients.generate(_reference(selector), max_tokens=6)
    return await client.note("generate", selector, rpc)


async def _get(client: _Client) -> Call:
    selector = client.selector()
    rpc = client.clients.store.Get(store_pb.GetRequest(adapter=_reference(selector)), timeout=9)
    return await client.note("get", selector, rpc)


async def _publish(client: _Client) -> Call:
    folder = client.dice.choice(client.folders)
    aliases = ["prod"] if client.dice.random() < 0.3 else []
    call = await client.note("publish", "", client.clients.publish(folder, NAME, aliases=aliases))
    if call.reason is None:
        client.digests[call.version] = call.digest
    return call


async def _alias(client: _Client) -> Call:
    version, is_canary = client.version(), client.dice.random() < 0.4
    request = store_pb.SetAliasRequest(name=NAME, alias="prod", version=version)
    request.canary_percent = 50 if is_canary else 0
    kind: Kind = "canary" if is_canary else "alias"
    return await client.note(
        kind, "prod", client.clients.store.SetAlias(request, timeout=9), version
    )


async def _roll_back(client: _Client) -> Call:
    request = store_pb.RollbackAliasRequest(name=NAME, alias="prod")
    return await client.note("rollback", "prod", client.clients.store.RollbackAlias(request))


async def _delete(client: _Client) -> Call:
    selector = "" if client.dice.random() < 0.3 else str(client.version())
    request = store_pb.DeleteRequest(adapter=_reference(selector))
    return await client.note("delete", selector, client.clients.store.Delete(request, timeout=9))


async def _pin(client: _Client) -> Call:
    selector = client.dice.choice(["", "prod"])
    request = store_pb.PinRequest(adapter=_reference(selector), reason="for now")
    return await client.note("pin", selector, client.clients.store.Pin(request, timeout=9))


async def _unpin(client: _Client) -> Call:
    selector = client.dice.choice(["", "prod"])
    request = store_pb.UnpinRequest(adapter=_reference(selector))
    return await client.note("unpin", selector, client.clients.store.Unpin(request, timeout=9))


async def _set_tenants(client: _Client) -> Call:
    tenants = ["acme"] if client.dice.random() < 0.2 else []
    request = store_pb.SetVisibilityRequest(name=NAME, tenants=tenants)
    return await client.note("tenants", "", client.clients.store.SetVisibility(request, timeout=9))


async def _unload(client: _Client) -> None:
    digests = sorted(set(client.digests.values()))
    if digests:
        await client.clients.unload(client.dice.choice(digests), grace_s=0.2)


def _reference(selector: str) -> str:
    return f"{NAME}@{selector}" if selector else NAME


_ACTS: dict[Callable[[_Client], Awaitable[Call | None]], int] = {
    _generate: 60,
    _get: 8,
    _publish: 6,
    _alias: 6,
    _roll_back: 3,
    _delete: 2,
    _pin: 2,
    _unpin: 3,
    _set_tenants: 2,
    _unload: 8,
}

_CHANGES = set(_ACTS) - {_generate, _get, _unload}


def _states(folder: Path) -> list[State]:
    """What the registry's documents say, from before the first."""
    entries = [
        from_json(path.read_bytes(), name=NAME, revision=int(path.stem))
        for path in sorted((folder / "store" / "registry" / NAME).iterdir())
    ]
    return [State(0, 0, {}, {}, {}, {}, frozenset()), *map(State.of, entries)]


@pytest.mark.slow
async def test_every_answer_of_a_name_that_64_clients_change_is_explained_by_its_history(
    tmp_path: Path,
) -> None:
    calls: list[Call] = []
    async with lifecycle_parts(tmp_path) as parts:
        digests: dict[int, str] = {}
        folders = [parts.folder_of(seed) for seed in range(WEIGHTS)]
        for number in (1, 2):
            await parts.start_worker(
                f"worker-{number}", step_ms=4, pool_blocks=400, host_cache_bytes=60_000
            )
        watch = await ResidencyWatch.open(parts)
        digests[1] = (await parts.publish(NAME)).ref.digest  # once the registry can be changed
        clients = await parts.clients()
        until_s = time.monotonic() + SECONDS
        async with asyncio.timeout(SECONDS + 3 * LIMIT_S), asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                client = _Client(number, clients, folders=folders, digests=digests)
                group.create_task(client.run(until_s, calls))
        for worker_id in parts.workers:
            await parts.check_rest(worker_id)
        await watch.until(lambda it: _is_as_told(parts, it))
        states = _states(tmp_path)
        await _unload_all(parts, clients, set(digests.values()))
    first = Call(-1, "publish", "", 0, states[1].decided_ns + 1, 1, states[1].versions[1])
    found = violations(
        states, [first, *calls], stale_s=STALE_S, publishes_max=AdapterStoreSettings().publishes_max
    )
    again = f"CALUMMA_FUZZ_SEED={SEED} python -m pytest {__file__}"
    assert not found, f"{len(found)} of {len(calls)}: {found[0]}; again: {again}"
    done = Counter(call.kind for call in calls if call.reason is None)
    assert done["generate"] > 50
    assert min(done[kind] for kind in ("publish", "alias", "delete", "pin", "get")) > 0


def _is_as_told(parts: LifecycleParts, watch: ResidencyWatch) -> bool:
    """Whether the scheduler's watchers hear of exactly what workers hold."""
    return watch.workers.keys() == parts.workers.keys() and all(
        {one.digest for one in watch.workers[name].adapters} == set(running.residency.held())
        for name, running in parts.workers.items()
    )


async def _unload_all(parts: LifecycleParts, clients: Clients, digests: set[str]) -> None:
    """Nobody wants anything any more: all memory comes back."""
    with contextlib.suppress(grpc.aio.AioRpcError):  # it may be deleted already
        await clients.store.Delete(store_pb.DeleteRequest(adapter=NAME))
    answers = await asyncio.gather(*(clients.unload(digest) for digest in digests))
    assert not any(answer.holding_workers for answer in answers)
    for worker_id, running in parts.workers.items():
        await parts.check_rest(worker_id)
        assert running.residency.held() == {}
        assert (await parts.worker_state(worker_id)).adapter_blocks == 0
