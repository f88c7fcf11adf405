"""Each field of a WorkItem and of a WorkerHello is checked, and named when it is wrong."""

from collections.abc import Callable

import pytest

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.scheduler.validation import check_work_item, check_worker_hello
from tests.support.scheduler_peers import BASE_MODEL, work_item

WorkItem = scheduler_pb2.WorkItem


def change(path: str, value: object) -> Callable[[WorkItem], None]:
    """A change that sets the field at a dotted path; None clears it."""

    def apply(item: WorkItem) -> None:
        *parents, name = path.split(".")
        message: object = item
        for parent in parents:
            message = getattr(message, parent)
        if value is None:
            message.ClearField(name)  # type: ignore[attr-defined]
        elif isinstance(value, list):
            getattr(message, name)[:] = value
        else:
            setattr(message, name, value)

    return apply


BAD = [
    ("request_id", ""),
    ("request_id", "a b"),
    ("request_id", "x" * 201),
    ("attempt", 0),
    ("gateway_id", "gateway-2"),
    ("tenant", ""),
    ("token_ids", []),
    ("token_ids", [3, -1]),
    ("prompt_tokens", 0),
    ("prompt_tokens", 9),
    ("adapter.digest", "billing-json"),
    ("adapter.rank", 0),
    ("adapter.size_bytes", 0),
    ("sampling.temperature", float("nan")),
    ("sampling.temperature", None),
    ("sampling.temperature", 2.5),
    ("sampling.top_p", 0.0),
    ("sampling.top_p", 1.5),
    ("sampling.top_k", 1001),
    ("sampling.min_p", float("inf")),
    ("sampling.seed", None),
    ("sampling.presence_penalty", -3.0),
    ("sampling.frequency_penalty", 3.0),
    ("sampling.repetition_penalty", 0.0),
    ("stopping.max_tokens", None),
    ("stopping.max_tokens", 0),
    ("stopping.min_tokens", -1),
    ("stopping.min_tokens", 1000),
    ("stopping.stop", ["\n\n"]),
    ("stopping.stop_token_ids", list(range(65))),
    ("logprobs", 21),
    ("logprobs", -1),
    ("priority", 101),
    ("predicted_output_tokens", 0),
    ("output_tokens_q90", -1),
    ("waited_s", -0.5),
    ("waited_s", float("nan")),
    ("waited_s", float("inf")),
    ("traceparent", "0" * 500),
]


def test_a_resolved_item_passes() -> None:
    check_work_item(work_item("r.1", adapter=1, time_left_s=1.0), gateway_id="gateway-1")


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: str(value)[:24])
def test_a_bad_field_is_named(field: str, value: object) -> None:
    item = work_item("r.1", adapter=1)
    change(field, value)(item)
    with pytest.raises(RpcError) as caught:
        check_work_item(item, gateway_id="gateway-1")
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.context.field == field


def test_a_resubmission_must_leave_a_token_to_generate() -> None:
    check_work_item(work_item("r.1", prior_tokens=63), gateway_id="gateway-1")
    with pytest.raises(RpcError) as caught:
        check_work_item(work_item("r.1", prior_tokens=64), gateway_id="gateway-1")
    assert caught.value.context.field == "stopping.max_tokens"


def worker_hello() -> scheduler_pb2.WorkerHello:
    return scheduler_pb2.WorkerHello(
        worker_id="worker-1",
        address="10.0.0.7:7102",
        base_model_digest=BASE_MODEL,
        capacity=scheduler_pb2.WorkerCapacity(
            pool_blocks=1, block_bytes=1, block_tokens=1, max_requests=1, max_context_tokens=1
        ),
    )


@pytest.mark.parametrize("field", ["worker_id", "address", "base_model_digest"])
def test_a_worker_without_a_name_address_or_model_is_refused(field: str) -> None:
    hello = worker_hello()
    check_worker_hello(hello)
    hello.ClearField(field)  # type: ignore[arg-type]
    with pytest.raises(RpcError) as caught:
        check_worker_hello(hello)
    assert caught.value.context.field == f"hello.{field}"


@pytest.mark.parametrize(
    "field", ["pool_blocks", "block_bytes", "block_tokens", "max_requests", "max_context_tokens"]
)
def test_every_limit_of_a_worker_must_be_positive(field: str) -> None:
    hello = worker_hello()
    setattr(hello.capacity, field, 0)
    with pytest.raises(RpcError) as caught:
        check_worker_hello(hello)
    assert caught.value.context.field == f"hello.capacity.{field}"
