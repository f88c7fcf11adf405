"""What clients get when all goes well."""

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from tests.support.gateway_peers import (
    soon,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


async def test_a_stream_carries_everything_a_client_may_know(suite: Suite) -> None:
    ref = suite.store.publish("poet")
    await suite.start()
    reader = suite.stream(
        "go",
        request_id="r1",
        adapter="poet",
        logprobs=1,
        priority=5,
        sampling=common_pb2.SamplingParams(temperature=0.5, seed=11),
        stopping=common_pb2.StopConditions(max_tokens=9, stop=["#"], stop_token_ids=[3]),
    )
    item = await suite.scheduler.next_item()
    assert item.request_id.startswith("r1.")
    assert (item.attempt, item.prompt_tokens, item.priority, item.tenant) == (1, 2, 5, "default")
    assert list(item.token_ids) == suite.encode("go")
    assert item.adapter == ref
    assert (item.sampling.seed, item.sampling.top_p, item.sampling.HasField("top_k")) == (11, 1, 1)
    assert item.stopping == common_pb2.StopConditions(
        max_tokens=9, min_tokens=0, stop_token_ids=[3]
    )
    assert item.gateway_id == suite.gateway.gateway_id
    assert (item.predicted_output_tokens, item.output_tokens_q90, item.waited_s) == (2, 9, 0)
    assert 0 < item.time_left.ToSeconds() <= 3600

    suite.scheduler.place(item, suite.worker, queue_s=0.25)
    await reader.read()
    assert reader.started == gateway_pb2.GenerateStarted(
        request_id="r1", adapter=ref, prompt_tokens=2
    )
    first, second = suite.encode("hi")
    position = common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=first, logprob=-0.5),
        top=[common_pb2.TokenLogprob(token_id=second, logprob=-0.7)],
    )
    suite.worker.send(item, 0, "h", logprobs=[position])
    await reader.read_until("h")
    timings = common_pb2.RequestTimings(
        queue_s=0.25,
        adapter_load_s=0.5,
        prefill_s=0.125,
        decode_s=2,
        adapter_tier=common_pb2.ADAPTER_TIER_STORE,
        cached_tokens=1,
    )
    suite.worker.send(item, 1, "i", finish=LENGTH, timings=timings)
    done = await reader.read_all()
    assert (reader.text, reader.token_ids) == ("hi", suite.encode("hi"))
    assert reader.logprobs[0].chosen.text == "h"
    assert reader.logprobs[0].top[0].text == "i"
    assert done.finish_reason == LENGTH
    assert done.timings == timings
    assert (done.worker_id, done.seed, done.resubmissions) == ("w1", 11, 0)
    assert done.usage == gateway_pb2.Usage(
        prompt_tokens=2, output_tokens=2, predicted_output_tokens=2, cached_prompt_tokens=1
    )
    assert 0 < done.time_to_first_token_s < 10


async def test_the_unary_form_answers_the_same(suite: Suite) -> None:
    await suite.start()
    messages = [gateway_pb2.ChatMessage(role="user", content="é")]
    call = suite.stub.Generate(
        gateway_pb2.GenerateRequest(chat=gateway_pb2.ChatMessages(messages=messages))
    )
    item = await suite.scheduler.next_item()
    assert list(item.token_ids) == suite.encode("[user]é[assistant]")
    assert not item.HasField("adapter")
    assert not item.HasField("logprobs")
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "ja ")
    suite.worker.send(item, 3, "wohl", finish=STOP)
    answer = await soon(call)
    assert (answer.text, list(answer.token_ids)) == ("ja wohl", suite.encode("ja wohl"))
    assert answer.request_id == item.request_id.rpartition(".")[0]
    assert answer.completion.seed == item.sampling.seed
    assert answer.completion.finish_reason == STOP
    assert not answer.HasField("adapter")


async def test_two_adapters_and_the_base_model_stream_side_by_side(suite: Suite) -> None:
    one, two = suite.store.publish("one"), suite.store.publish("two")
    suite.store.publish("two", stable=1)
    await suite.start()
    names = {"one": one, "two@stable": two, "": common_pb2.AdapterRef()}
    readers = {name: suite.stream(adapter=name) for name in names}
    for _ in readers:
        item = await suite.scheduler.next_item()
        suite.scheduler.place(item, suite.worker)
        suite.worker.send(item, 0, f"I am {item.adapter.digest[-4:]}", finish=STOP)
    for name, reader in readers.items():
        await reader.read_all()
        assert reader.text == f"I am {names[name].digest[-4:]}"
        assert reader.started is not None
        assert reader.started.adapter == names[name]


async def test_the_prediction_learns_from_what_was_finished(suite: Suite) -> None:
    await suite.start()
    stopping = common_pb2.StopConditions(max_tokens=500)
    predictions, q90s = [], []
    for _ in range(8):
        reader = suite.stream(stopping=stopping)
        item = await suite.scheduler.next_item()
        predictions.append(item.predicted_output_tokens)
        q90s.append(item.output_tokens_q90)
        suite.worker.send(item, 0, "four", finish=STOP)
        await reader.read_all()
    assert (predictions[0], q90s[0]) == (125, 500)
    assert predictions == sorted(predictions, reverse=True)
    assert predictions[-1] < 100
    assert all(least <= most <= 500 for least, most in zip(predictions, q90s, strict=True))
    assert predictions[-1] < q90s[-1]
