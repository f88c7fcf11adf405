"""A gateway whose estimator of output lengths is broken answers as ever."""

import math
from typing import Any

import pytest

from calumma.common.v1 import common_pb2
from services.gateway.predictor import DecayedLengths
from tests.support.gateway_suite import Suite


@pytest.mark.parametrize("said", [math.nan, -1.0, math.inf, None, RuntimeError("on purpose")])
async def test_a_broken_estimator_costs_a_request_nothing_but_its_guess(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    def answer(*_: Any) -> tuple[object, object]:
        if isinstance(said, Exception):
            raise said
        return said, said

    def forget(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(DecayedLengths, "estimate", answer)
    monkeypatch.setattr(DecayedLengths, "learn", forget)
    await suite.start()
    reader = suite.stream("go", stopping=common_pb2.StopConditions(max_tokens=9))
    item = await suite.scheduler.next_item()
    assert (item.predicted_output_tokens, item.output_tokens_q90) == (9, 9)
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "hi", finish=common_pb2.FINISH_REASON_LENGTH)
    await reader.read_all()
    assert reader.text == "hi"
