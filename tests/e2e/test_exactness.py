"""Same input, same output: the whole suite against transformers + PEFT, in fp32, greedy."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.suite import ADAPTERS_DIR, Suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from examples.adapter_tasks import TASKS

pytestmark = [pytest.mark.model, pytest.mark.slow]
MAX_TOKENS = 24


@dataclass(frozen=True)
class Case:
    adapter: str
    prompt: str


def _cases(adapters: Sequence[str]) -> list[Case]:
    cases = [
        Case(name, example.prompt)
        for name in adapters
        for example in TASKS[name].make_examples("heldout", 1, seed=11)
    ]
    return [*cases, *(Case("", case.prompt) for case in cases[::4])]


@pytest.fixture(scope="module")
def cases(suite: Suite) -> list[Case]:
    assert len(suite.adapters) >= 8
    return _cases(suite.adapters)


@pytest.fixture(scope="module")
def reference(cases: list[Case], model_folder: Path) -> list[list[int]]:
    """Token ids of transformers + PEFT, one request at a time."""
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32
    )
    names = sorted({case.adapter for case in cases} - {""})
    model = peft.PeftModel.from_pretrained(model, ADAPTERS_DIR / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(ADAPTERS_DIR / name, name)
    model.eval().float()

    def generate(case: Case) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": case.prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        options = {**inputs, "max_new_tokens": MAX_TOKENS, "do_sample": False}
        with torch.inference_mode():
            if case.adapter:
                model.set_adapter(case.adapter)
                output = model.generate(**options)
            else:
                with model.disable_adapter():
                    output = model.generate(**options)
        new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return new[:-1] if new[-1] == tokenizer.eos_token_id else new

    return [generate(case) for case in cases]


def test_all_adapters_and_the_base_in_one_batch_equal_peft(
    suite: Suite, cases: list[Case], reference: list[list[int]]
) -> None:
    answers = asyncio.run(_generate(suite.gateway, cases, concurrency=len(cases)))

    _assert_equal(cases, answers, reference)


def test_each_request_alone_equals_peft(
    suite: Suite, cases: list[Case], reference: list[list[int]]
) -> None:
    answers = asyncio.run(_generate(suite.gateway, cases, concurrency=1))

    _assert_equal(cases, answers, reference)


def _assert_equal(cases: list[Case], answers: list[list[int]], reference: list[list[int]]) -> None:
    different = [
        (case, answer, expected)
        for case, answer, expected in zip(cases, answers, reference, strict=True)
        if answer != expected
    ]
    assert not different, different[0]


async def _generate(gateway: str, cases: list[Case], *, concurrency: int) -> list[list[int]]:
    slots = asyncio.Semaphore(concurrency)
    async with grpc.aio.insecure_channel(gateway) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)

        async def one(case: Case) -> list[int]:
            request = gateway_pb2.GenerateRequest(
                chat=gateway_pb2.ChatMessages(
                    messages=[gateway_pb2.ChatMessage(role="user", content=case.prompt)]
                ),
                adapter=case.adapter,
                stopping=common_pb2.StopConditions(max_tokens=MAX_TOKENS),
            )
            async with slots:
                return list((await stub.Generate(request, timeout=300)).token_ids)

        return list(await asyncio.gather(*(one(case) for case in cases)))
