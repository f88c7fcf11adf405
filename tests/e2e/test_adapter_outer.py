"""Adapters of the embedding and the head, from PEFT's folder to a client's tokens, equal PEFT.

The whole suite in one process, real services that speak real gRPC around the torch engine in fp32,
greedy; first in one batch, then with a store so slow that prompts begin before their adapter is
there.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("torch")
LoraConfig: Any = pytest.importorskip("peft").LoraConfig

from calumma.common.v1 import common_pb2  # noqa: E402
from calumma.gateway.v1 import gateway_pb2  # noqa: E402
from services.worker.outputs import Tier  # noqa: E402
from tests.engine.peft_world import PeftWorld, peft_world, prompt  # noqa: E402
from tests.support.fault_proxy import CLEAN, Fault, run_fault_proxy  # noqa: E402
from tests.support.lifecycle_parts import Clients  # noqa: E402
from tests.support.suite_parts import LIMIT_S  # noqa: E402
from tests.support.torch_parts import TorchParts, note_steps, torch_parts  # noqa: E402

TOKENS = 24
LONG = 120  # prompt tokens
# Of several MiB, so that they travel in several messages.
ADAPTERS = {
    "everything": LoraConfig(
        r=256,
        lora_alpha=16,
        target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj", "down_proj"],
        rank_pattern={"lm_head": 3, "embed_tokens": 33},
        alpha_pattern={"lm_head": 5, "embed_tokens": 8},
    ),
    "linears": LoraConfig(r=128, lora_alpha=8, target_modules="all-linear"),
}
NAMES = [*ADAPTERS, None]


@pytest.fixture(scope="module", params=["llama", "llama with biases"], ids=["tied", "untied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), ADAPTERS, base=request.param)


@pytest.fixture
async def parts(world: PeftWorld, tmp_path: Path) -> AsyncIterator[TorchParts]:
    async with torch_parts(tmp_path, world) as parts:
        yield parts


async def publish_all(parts: TorchParts, clients: Clients) -> None:
    await parts.store_is_ready()
    for name in ADAPTERS:
        await clients.publish(parts.model.parent / "peft" / name, name)


def stream(clients: Clients, name: str | None, ids: list[int], *, tokens: int = TOKENS) -> Any:
    request = gateway_pb2.GenerateStreamRequest(
        token_ids=gateway_pb2.TokenIds(ids=ids),
        adapter=name or "",
        sampling=common_pb2.SamplingParams(temperature=0.0),
        stopping=common_pb2.StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    return clients.gateway.GenerateStream(request, timeout=3 * LIMIT_S)


async def tokens_of(call: Any, into: list[int] | None = None) -> list[int]:
    found = into if into is not None else []
    while (message := await call.read()) is not grpc.aio.EOF:
        found += message.chunk.token_ids
    return found


async def test_embedding_and_head_another_adapter_and_the_base_in_one_batch_equal_peft(
    world: PeftWorld, parts: TorchParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = note_steps(monkeypatch)
    await parts.start_torch_worker()
    clients = await parts.clients()
    await publish_all(parts, clients)
    prompts = [prompt(i, 10 + i) for i in range(6)]
    wanted = [(NAMES[i % 3], ids) for i, ids in enumerate(prompts)]
    answers = await asyncio.gather(*(tokens_of(stream(clients, name, ids)) for name, ids in wanted))
    expected = [world.greedy(name, ids, TOKENS) for name, ids in wanted]
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert max(len(step) for step in steps) == len(wanted)


async def test_a_prompt_that_begins_before_its_adapter_is_there_gives_the_same_tokens(
    world: PeftWorld, parts: TorchParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = note_steps(monkeypatch)
    async with run_fault_proxy(f"http://{parts.store.address}") as proxy:
        worker = await parts.start_torch_worker(store_address=proxy.url.removeprefix("http://"))
        clients = await parts.clients()
        await publish_all(parts, clients)
        for number, name in enumerate(ADAPTERS):
            ids, other = prompt(number, LONG), prompt(9 + number)
            heard: list[int] = []
            beside = asyncio.create_task(tokens_of(stream(clients, None, other, tokens=230), heard))
            while not heard:
                await asyncio.sleep(0.01)
            before = len(heard)
            proxy.set(Fault(bytes_per_s=len(world.blobs[name][1])))
            cold = await tokens_of(stream(clients, name, ids))
            proxy.set(CLEAN)
            assert len(heard) > before + 20  # the one beside it went on
            assert await beside == world.greedy(None, other, 230)
            parted = {item.until_layer for step in steps for item in step} - {None}
            assert parted, "no step passed a part of the layers"
            steps.clear()
            digest = world.digest(name)
            assert digest is not None
            assert worker.residency.held()[digest].tier is Tier.DEVICE  # type: ignore[index]
            warm = await tokens_of(stream(clients, name, ids))
            assert cold == warm == world.greedy(name, ids, TOKENS)
            assert {item.until_layer for step in steps for item in step} == {None}
            steps.clear()
        assert worker.measures.tiers == {Tier.STORE: 2, Tier.DEVICE: 2}
        await parts.stop_worker("worker-1")


async def test_a_name_that_gets_new_weights_under_its_requests_mixes_nothing_up(
    world: PeftWorld, parts: TorchParts
) -> None:
    worker = await parts.start_torch_worker()
    clients = await parts.clients()
    await parts.store_is_ready()
    folders = {name: parts.model.parent / "peft" / name for name in ADAPTERS}
    await clients.publish(folders["everything"], "poet")
    ids = prompt(7, 20)  # of both, so that keys and values that are mixed up would be seen
    first: list[int] = []
    old = asyncio.create_task(tokens_of(stream(clients, "poet", ids, tokens=200), first))
    while not first:
        await asyncio.sleep(0.005)
    await clients.publish(folders["linears"], "poet")
    renewed = asyncio.create_task(tokens_of(stream(clients, "poet@2", ids)))
    pinned = asyncio.create_task(tokens_of(stream(clients, "poet@1", ids)))
    base = asyncio.create_task(tokens_of(stream(clients, None, ids)))
    assert await renewed == world.greedy("linears", ids, TOKENS)
    assert await pinned == world.greedy("everything", ids, TOKENS)
    assert await base == world.greedy(None, ids, TOKENS)
    assert await old == world.greedy("everything", ids, 200)
    assert await tokens_of(stream(clients, "poet", ids)) == world.greedy("linears", ids, TOKENS)
    assert await worker.driver.wait_idle(LIMIT_S)
    worker.core.check_integrity()
    worker.residency.check_integrity()
