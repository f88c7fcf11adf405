"""Everything at once, from a seed: every request ends exactly once and nothing is left behind."""

import asyncio
import random
from collections import Counter

import pytest

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1.scheduler_pb2 import WorkItem
from services.common.errors import Reason
from tests.support.worker_peers import (
    Bench,
    bench,
    expected_tokens,
    make_blob,
    quick_engine,
    work_item,
)

REQUESTS = 120
GATEWAYS = ("gateway-1", "gateway-2")


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_request_ends_once_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    engine = quick_engine(step_ms=1, pool_blocks=90, max_sequences=16)
    async with bench(engine=engine, host_cache_bytes=10_000, prefill_tokens_per_step=32) as it:
        gateways = {name: await it.gateway(name) for name in GATEWAYS}
        refs = [None, *(it.store.add(make_blob(number)) for number in range(8)), make_blob(99).ref]
        items = [
            work_item(
                f"r{number}",
                gateway_id=dice.choice(GATEWAYS),
                tokens=dice.randint(1, 60),
                max_tokens=dice.randint(1, 60),
                adapter=dice.choice(refs),
                time_left_s=dice.choice([None, None, 0.01, 20.0]),
            )
            for number in range(REQUESTS)
        ]
        for item in items:
            item.predicted_output_tokens = dice.randint(1, 60)
        for first in range(0, REQUESTS, 4):
            await it.scheduler.dispatch(*items[first : first + 4])
            await _disturb(it, dice, items[: first + 4])
        for item in items:
            await gateways[item.gateway_id].ended(item.request_id)
        for item in items:
            gateway = gateways[item.gateway_id]
            expected = expected_tokens(item)
            last = gateway.endings[item.request_id]
            got = gateway.tokens[item.request_id]
            assert got == expected[: len(got)]
            assert last.finish_reason != common_pb2.FINISH_REASON_LENGTH or got == expected
            assert last.error.reason in {"", Reason.DEADLINE_EXCEEDED, Reason.ADAPTER_NOT_FOUND}
        for item in items:
            await it.scheduler.has_finished(item.request_id)
        assert {len(reports) for reports in it.scheduler.finished.values()} == {1}
        kinds = Counter(g.endings[r].finish_reason for g in gateways.values() for r in g.endings)
        assert kinds[common_pb2.FINISH_REASON_LENGTH] > 0


async def _disturb(it: Bench, dice: random.Random, items: list[WorkItem]) -> None:
    """Cancel a late one of the dispatched items, break something, or wait a little."""
    match dice.randrange(6):
        case 0 | 1:
            await it.scheduler.abort(dice.choice(items[-8:]).request_id)
        case 2:
            gateway = dice.choice(it.gateways)
            await gateway.break_stream()
            await asyncio.sleep(0.005)
            seen = [(name, len(tokens)) for name, tokens in gateway.tokens.items()]
            await gateway.open([point for point in seen if point[0] not in gateway.endings])
        case 3:
            it.store.breaks += 1
        case _:
            await asyncio.sleep(dice.random() * 0.02)
