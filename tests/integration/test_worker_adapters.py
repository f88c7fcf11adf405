"""How adapters come to a worker, and what happens when they do not."""

import asyncio

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from calumma.common.v1 import common_pb2
from services.common.errors import Reason
from services.core.types import AdapterDigest
from services.worker.engine.simulated import SimulatedEngine
from services.worker.intake import COPIES_MAX, parts
from services.worker.outputs import Tier
from tests.support.worker_peers import (
    INFO,
    Bench,
    bench,
    expected_tokens,
    make_blob,
    quick_engine,
    work_item,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_hundred_requests_for_one_cold_adapter_make_one_download() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        items = [work_item(f"r{i}", adapter=ref) for i in range(100)]
        await it.scheduler.dispatch(*items)
        await it.store.asked()
        await it.scheduler.abort("r0")  # the one whose coming began it
        await gateway.ended("r0")
        it.store.gate.set()
        await gateway.ended(*(item.request_id for item in items))
        assert it.store.offsets == [0]
        for item in items[1:]:
            assert gateway.tokens[item.request_id] == expected_tokens(item)
            timings = gateway.endings[item.request_id].timings
            assert timings.adapter_tier == common_pb2.ADAPTER_TIER_STORE
            assert timings.adapter_load_s > 0


async def test_a_hundred_requests_for_one_adapter_that_fails_get_the_same_error() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        blob = make_blob(1)
        it.store.blobs[blob.digest] = blob.data[:-1] + b"!"
        items = [work_item(f"r{i}", adapter=blob.ref) for i in range(100)]
        await it.scheduler.dispatch(*items)
        await it.store.asked()
        it.store.gate.set()
        await gateway.ended(*(item.request_id for item in items))
        assert it.store.offsets == [0]
        errors = [gateway.endings[item.request_id].error for item in items]
        assert {(error.reason, error.message) for error in errors} == {
            (Reason.ADAPTER_CORRUPT, errors[0].message)
        }
        await it.until(lambda: it.engine.adapters == {})  # on its own thread
        assert it.worker.residency.held() == {}


async def test_a_load_that_all_have_left_ends_in_host_memory_all_the_same() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        await it.store.asked()
        await it.scheduler.abort("one")
        await gateway.ended("one")
        it.store.gate.set()
        await it.until(lambda: ref.digest in it.worker.residency.near())
        assert it.store.offsets == [0]


async def test_the_engine_has_the_first_layers_while_the_last_ones_come() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1, layers=INFO.num_layers, rank=8)
        ref = it.store.add(blob)
        rest = it.store.pauses_at[len(blob.data) - 1] = asyncio.Event()
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        there = parts(INFO.num_layers, COPIES_MAX)[-2]
        await it.until(lambda: it.engine.adapters.get(ref.digest) == there)
        await it.until(lambda: _ready_layers(it, ref.digest) == there)
        assert it.worker.residency.held()[AdapterDigest(ref.digest)].tier == Tier.STORE
        assert "one" not in gateway.endings
        rest.set()
        await gateway.ended("one")
        assert gateway.tokens["one"] == expected_tokens(work_item("one"))
        held = it.worker.residency.held()[AdapterDigest(ref.digest)]
        assert (held.tier, held.in_host, held.ready_layers) == (Tier.DEVICE, True, None)


async def test_a_prompt_begins_with_the_layers_that_came() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1, layers=INFO.num_layers, rank=8)
        rest = it.store.pauses_at[len(blob.data) - 1] = asyncio.Event()
        items = [work_item("one", adapter=it.store.add(blob)), work_item("base", max_tokens=400)]
        await it.scheduler.dispatch(*items)
        await it.until(lambda: bool(it.engine.parts))
        await gateway.ended("base")
        assert "one" not in gateway.endings
        rest.set()
        await gateway.ended("one")
        assert {part.sequence_id for part in it.engine.parts} == {"one#1"}
        assert max(part.until_layer or 0 for part in it.engine.parts) < INFO.num_layers
        for item in items:
            assert gateway.tokens[item.request_id] == expected_tokens(item)


async def test_a_prompt_that_began_fails_when_its_adapter_turns_out_wrong() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1, layers=INFO.num_layers, rank=8)
        it.store.blobs[blob.digest] = blob.data[:-1] + b"!"
        rest = it.store.pauses_at[len(blob.data) - 1] = asyncio.Event()
        bad = [work_item(f"bad-{i}", adapter=blob.ref) for i in range(3)]
        base = work_item("base", max_tokens=400)
        await it.scheduler.dispatch(*bad, base)
        await it.until(lambda: len({part.sequence_id for part in it.engine.parts}) == len(bad))
        rest.set()
        await gateway.ended("base", *(item.request_id for item in bad))
        for item in bad:
            error = gateway.endings[item.request_id].error
            assert (error.reason, "does not have its digest" in error.message) == (
                Reason.ADAPTER_CORRUPT,
                True,
            )
        assert gateway.tokens["base"] == expected_tokens(base)
        await it.until(lambda: it.engine.adapters == {})
        it.store.add(blob)
        await it.scheduler.dispatch(work_item("good", adapter=blob.ref))
        await gateway.ended("good")
        assert gateway.tokens["good"] == expected_tokens(work_item("good"))


async def test_a_prompt_that_began_can_be_aborted_before_its_adapter_is_there() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1, layers=INFO.num_layers, rank=8)
        rest = it.store.pauses_at[len(blob.data) - 1] = asyncio.Event()
        one = work_item("one", adapter=it.store.add(blob))
        await it.scheduler.dispatch(one, work_item("base", max_tokens=400))
        await it.until(lambda: bool(it.engine.parts))
        await it.scheduler.abort("one")
        await gateway.ended("one")
        await it.until(lambda: it.engine.open == {"base#1"})
        rest.set()
        await it.scheduler.abort("base")
        await it.until(lambda: blob.digest in it.worker.residency.near())


async def test_an_adapter_that_turns_out_wrong_at_its_end_leaves_the_engine() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1, layers=INFO.num_layers)
        it.store.blobs[blob.digest] = blob.data[:-1] + b"!"
        await it.scheduler.dispatch(work_item("bad", adapter=blob.ref))
        assert (await gateway.ended("bad")).error.reason == Reason.ADAPTER_CORRUPT
        assert it.engine.most_layers[blob.digest] > 0
        await it.until(lambda: it.engine.adapters == {})
        it.store.add(blob)
        await it.scheduler.dispatch(work_item("good", adapter=blob.ref))
        await gateway.ended("good")
        assert gateway.tokens["good"] == expected_tokens(work_item("good"))


async def test_a_dropped_copy_in_host_memory_is_downloaded_again() -> None:
    async with bench(engine=_room_for_one_adapter()) as it:
        gateway = await it.gateway()
        first, second = it.store.add(make_blob(1)), it.store.add(make_blob(2))
        await it.scheduler.dispatch(work_item("r0", adapter=first))
        await gateway.ended("r0")
        it.worker.residency.drop_host(AdapterDigest(first.digest))
        held = it.worker.residency.held()[AdapterDigest(first.digest)]
        assert (held.tier, held.in_host) == (Tier.DEVICE, False)
        for number, ref in enumerate((first, second, first), start=1):
            await it.scheduler.dispatch(work_item(f"r{number}", adapter=ref))
            await gateway.ended(f"r{number}")
        assert gateway.endings["r1"].timings.adapter_tier == common_pb2.ADAPTER_TIER_DEVICE
        assert gateway.endings["r3"].timings.adapter_tier == common_pb2.ADAPTER_TIER_STORE


async def test_what_was_moved_and_found_is_counted() -> None:
    async with bench(engine=_room_for_one_adapter()) as it:
        gateway = await it.gateway()
        first, second = it.store.add(make_blob(1)), it.store.add(make_blob(2))
        for number, ref in enumerate((first, first, second, first, None)):
            await it.scheduler.dispatch(work_item(f"r{number}", adapter=ref))
            await gateway.ended(f"r{number}")
        measures = it.worker.measures
        assert measures.tiers == {Tier.DEVICE: 1, Tier.HOST: 1, Tier.STORE: 2}
        assert (measures.hits, measures.misses, measures.evictions) == (1, 3, 2)
        assert measures.downloaded_bytes == first.size_bytes + second.size_bytes
        assert measures.loaded_bytes == 2 * first.size_bytes + second.size_bytes


async def test_the_tier_says_where_the_adapter_was() -> None:
    async with bench(engine=_room_for_one_adapter()) as it:
        gateway = await it.gateway()
        first, second = it.store.add(make_blob(1)), it.store.add(make_blob(2))
        tiers = []
        for number, ref in enumerate((first, first, second, first)):
            await it.scheduler.dispatch(work_item(f"r{number}", adapter=ref))
            tiers.append((await gateway.ended(f"r{number}")).timings.adapter_tier)
        assert tiers == [
            common_pb2.ADAPTER_TIER_STORE,
            common_pb2.ADAPTER_TIER_DEVICE,
            common_pb2.ADAPTER_TIER_STORE,
            common_pb2.ADAPTER_TIER_HOST,
        ]
        assert len(it.store.offsets) == 2
        assert gateway.endings["r1"].timings.adapter_load_s == 0


async def test_a_host_cache_of_no_bytes_downloads_again() -> None:
    async with bench(engine=_room_for_one_adapter(), host_cache_bytes=0) as it:
        gateway = await it.gateway()
        first, second = it.store.add(make_blob(1)), it.store.add(make_blob(2))
        for number, ref in enumerate((first, second, first)):
            await it.scheduler.dispatch(work_item(f"r{number}", adapter=ref))
            await gateway.ended(f"r{number}")
        assert len(it.store.offsets) == 3


async def test_a_hinted_adapter_is_there_when_its_request_comes() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1))
        bad = common_pb2.AdapterRef(digest="nonsense")
        await it.scheduler.prefetch(bad, ref)
        await it.scheduler.until(lambda: any(status.resident for status in it.scheduler.statuses))
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        last = await gateway.ended("one")
        assert last.timings.adapter_tier == common_pb2.ADAPTER_TIER_DEVICE


async def test_a_broken_download_is_resumed_where_it_stopped() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1, rank=8))
        it.store.breaks = 6  # more than the tries that may bring nothing
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        assert (await gateway.ended("one")).finish_reason
        assert len(it.store.offsets) == 7
        assert it.store.offsets == sorted(it.store.offsets)
        assert it.store.offsets[-1] > 0


async def test_a_silent_download_is_resumed() -> None:
    async with bench(store_read_timeout_s=0.2) as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1))
        it.store.silences = 1
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        assert (await gateway.ended("one")).finish_reason
        assert len(it.store.offsets) == 2


async def test_an_adapter_in_host_memory_is_served_while_the_store_hangs() -> None:
    async with bench(engine=_room_for_adapters(2), adapter_loads=1) as it:
        gateway = await it.gateway()
        refs = [it.store.add(make_blob(number)) for number in range(4)]
        for number, ref in enumerate(refs[:3]):  # the third drives the first one out
            await it.scheduler.dispatch(work_item(f"r{number}", adapter=ref))
            await gateway.ended(f"r{number}")
        it.store.gate.clear()
        await it.scheduler.dispatch(work_item("cold", adapter=refs[3]))
        await it.scheduler.dispatch(work_item("host", adapter=refs[0]))
        last = await gateway.ended("host")
        assert last.timings.adapter_tier == common_pb2.ADAPTER_TIER_HOST
        assert "cold" not in gateway.endings
        it.store.gate.set()
        await gateway.ended("cold")


async def test_a_store_that_hangs_is_given_up_sooner_than_one_that_breaks() -> None:
    async with bench(store_read_timeout_s=0.2) as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        await it.scheduler.dispatch(work_item("one", adapter=it.store.add(make_blob(1))))
        error = (await gateway.ended("one")).error
        assert (error.reason, error.stage) == (Reason.STORE_UNAVAILABLE, "adapter_load")
        assert error.retry_after_s > 0
        assert it.store.offsets == [0, 0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("absent", Reason.ADAPTER_NOT_FOUND),
        ("flipped", Reason.ADAPTER_CORRUPT),
        ("longer", Reason.ADAPTER_CORRUPT),
        ("down", Reason.STORE_UNAVAILABLE),
    ],
)
async def test_an_adapter_that_does_not_come_fails_its_requests_only(
    fault: str, reason: Reason
) -> None:
    async with bench() as it:
        gateway = await it.gateway()
        there, blob = it.store.add(make_blob(1)), make_blob(2)
        await it.scheduler.dispatch(work_item("before", adapter=there))
        await gateway.ended("before")
        match fault:
            case "flipped":
                it.store.blobs[blob.digest] = blob.data[:-1] + b"!"
            case "longer":
                it.store.blobs[blob.digest] = blob.data + b"!"
            case "down":
                await it.store.close()
            case _:
                assert fault == "absent"
        bad = [work_item(f"bad-{i}", adapter=blob.ref) for i in range(3)]
        good = [work_item("resident", adapter=there), work_item("base")]
        await it.scheduler.dispatch(*bad, *good)
        await gateway.ended("resident", "base", *(item.request_id for item in bad))
        for item in bad:
            error = gateway.endings[item.request_id].error
            assert error.reason == reason
            assert error.stage == "adapter_load"
            await it.scheduler.has_finished(item.request_id)
        for item in good:
            assert gateway.tokens[item.request_id] == expected_tokens(item)


async def test_an_adapter_that_came_late_is_asked_for_again() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1)
        await it.scheduler.dispatch(work_item("early", adapter=blob.ref))
        assert (await gateway.ended("early")).error.reason == Reason.ADAPTER_NOT_FOUND
        it.store.add(blob)
        await it.scheduler.dispatch(work_item("late", adapter=blob.ref))
        assert (await gateway.ended("late")).finish_reason


async def test_an_adapter_that_the_engine_refuses_is_told_so_and_leaves_nothing() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.engine.incompatible = True
        await it.scheduler.dispatch(work_item("one", adapter=it.store.add(make_blob(1))))
        error = (await gateway.ended("one")).error
        assert error.reason == Reason.ADAPTER_BASE_MISMATCH
        assert "layer 0 q_proj" in error.message
        assert it.worker.residency.held() == {}


async def test_a_header_that_makes_no_sense_is_corrupt_though_it_has_its_digest() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        blob = make_blob(1)
        fake = type(blob)(blob.data.replace(b'"dtype":"BF16"', b'"dtype":"XX16"'), blob.rank)
        await it.scheduler.dispatch(work_item("one", adapter=it.store.add(fake)))
        assert (await gateway.ended("one")).error.reason == Reason.ADAPTER_CORRUPT
        assert it.engine.adapters == {}


async def test_one_waiter_that_leaves_does_not_take_the_adapter_from_the_others() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(
            work_item("leaves", adapter=ref), work_item("waits", adapter=ref)
        )
        await it.store.asked()
        await it.scheduler.abort("leaves")
        await gateway.ended("leaves")
        it.store.gate.set()
        await gateway.ended("waits")
        assert gateway.tokens["waits"] == expected_tokens(work_item("waits"))
        assert it.store.offsets == [0]


async def test_many_adapters_share_little_memory_and_every_request_ends_once() -> None:
    async with bench(engine=quick_engine(step_ms=1, pool_blocks=60)) as it:
        gateway = await it.gateway()
        refs = [it.store.add(make_blob(number)) for number in range(12)]
        items = [work_item(f"r{i}", adapter=refs[i % 12], max_tokens=30) for i in range(48)]
        for item in items:
            item.predicted_output_tokens = 1 + sum(item.request_id.encode()) % 30
        await it.scheduler.dispatch(*items)
        await gateway.ended(
            *(item.request_id for item in items),
        )
        for item in items:
            assert gateway.tokens[item.request_id] == expected_tokens(item)
        for item in items:
            await it.scheduler.has_finished(item.request_id)
        assert {len(reports) for reports in it.scheduler.finished.values()} == {1}
        assert set(gateway.ending_frames.values()) == {1}


async def test_the_download_joins_the_trace_of_the_first_request_that_waits() -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracer = provider.get_tracer("test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.common.telemetry.tracer", lambda: tracer)
        async with bench() as it:
            gateway = await it.gateway()
            ref = it.store.add(make_blob(1))
            await it.scheduler.dispatch(
                work_item("one", adapter=ref, traceparent=TRACEPARENT),
                work_item("two", adapter=ref, traceparent=TRACEPARENT),
            )
            await gateway.ended("one", "two")
    mine = [span for span in spans.get_finished_spans() if span.name in STAGES]
    assert sorted(span.name for span in mine) == sorted(STAGES * 2)
    trace_id = int(TRACEPARENT.split("-")[1], 16)
    assert {_context(span).trace_id for span in mine} == {trace_id}
    loads = [span for span in mine if span.name == "adapter_load"]
    tiers = [(span.attributes or {}).get("lora.adapter.cache_tier") for span in loads]
    assert tiers == ["store", "store"]
    header = it.store.metadata[0]["traceparent"]
    assert int(header.split("-")[2], 16) in {_context(span).span_id for span in loads}


def _ready_layers(it: Bench, digest: str) -> int | None:
    return it.worker.residency.held()[AdapterDigest(digest)].ready_layers


def _context(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def _room_for_one_adapter() -> SimulatedEngine:
    """A second adapter drives the first one out."""
    return _room_for_adapters(1)


def _room_for_adapters(count: int) -> SimulatedEngine:
    """Memory for so many adapters and as many requests."""
    blocks = -(-len(make_blob(1).data) // INFO.block_bytes)
    return quick_engine(pool_blocks=count * (blocks + 4))


STAGES = ["adapter_load", "prefill", "decode"]
