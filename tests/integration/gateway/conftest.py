"""A gateway over real gRPC, among peers that speak the protos and do what a test says."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.gateway_peers import (
    SchedulerPeer,
    StorePeer,
    WorkerPeer,
    write_model,
)
from tests.support.gateway_suite import Suite


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    tokenizer = write_model(tmp_path)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    async with AsyncExitStack() as stack:
        peers = SchedulerPeer(), WorkerPeer("w1", encode), WorkerPeer("w2", encode), StorePeer()
        for peer in peers:
            await peer.start()
            stack.push_async_callback(peer.stop)
        scheduler, worker, other, store = peers
        scheduler.workers = [worker, other]
        yield Suite(tmp_path, encode, scheduler, worker, other, store, stack)
