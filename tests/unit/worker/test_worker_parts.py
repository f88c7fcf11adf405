"""The engine's thread, reports and settings."""

import asyncio
import threading
from dataclasses import replace

import pytest
from pydantic import ValidationError

from services.common.config import load_settings
from services.core.systems import SYSTEMS
from services.core.types import Attempt, RequestId, Reserve
from services.worker.config import WorkerSettings
from services.worker.engine import EngineInfo, Sampling, SequenceSpec, StepItem
from services.worker.engine_thread import EngineThread, StepEnded
from services.worker.outputs import Finish
from services.worker.reports import PENDING_MAX, Finished, Reports
from tests.support.worker_peers import INFO, FaultyEngine, quick_engine


def test_reports_are_kept_only_while_a_stream_is_open() -> None:
    async def run() -> None:
        reports = Reports()
        report = Finished(Attempt(RequestId("one")), Finish.STOP, 3)
        reports.add(report)
        assert reports.take() == []
        reports.open()
        reports.add(report)
        assert reports.take() == [report]
        for _ in range(PENDING_MAX + 5):
            reports.add(report)
        assert reports.has_overflowed
        assert len(reports.take()) == PENDING_MAX + 1

    asyncio.run(run())


class _Watched(FaultyEngine):
    """Notes which thread it is called from; refuses one sequence."""

    def __init__(self) -> None:
        super().__init__(quick_engine())
        self.threads: set[str] = set()

    @property
    def info(self) -> EngineInfo:
        self.threads.add(threading.current_thread().name)
        return super().info

    def open_sequence(self, spec: SequenceSpec) -> None:
        self.threads.add(threading.current_thread().name)
        if spec.sequence_id == "refused":
            raise ValueError("no")
        super().open_sequence(spec)

    def close_sequence(self, sequence_id: str) -> None:
        self.threads.add(threading.current_thread().name)
        super().close_sequence(sequence_id)


async def test_one_thread_makes_all_calls_in_order_and_one_bad_sequence_harms_no_other() -> None:
    engine = _Watched()
    thread = EngineThread(lambda: engine)
    assert await thread.start() == INFO
    ended: asyncio.Future[StepEnded] = asyncio.get_running_loop().create_future()
    for name in ("refused", "fine"):
        thread.open_sequence(SequenceSpec(name, (1, 2), 2, None, Sampling(), max_tokens=5))
    items = [StepItem("refused", 2, new_blocks=(0,)), StepItem("fine", 2, new_blocks=(1,))]
    thread.run_step(items, ended.set_result)
    result = await asyncio.wait_for(ended, 5)
    assert result.unopened == ["refused"]
    assert [token.sequence_id for token in result.results] == ["fine"]
    assert result.error is None
    for name in ("refused", "fine"):
        thread.close_sequence(name)
    await thread.stop()
    assert engine.open == set()
    assert {name.rsplit("_", 1)[0] for name in engine.threads} == {"engine"}


async def test_a_step_that_raises_is_an_event() -> None:
    engine = FaultyEngine(quick_engine())
    thread = EngineThread(lambda: engine)
    await thread.start()
    engine.raises = 1
    ended: asyncio.Future[StepEnded] = asyncio.get_running_loop().create_future()
    thread.open_sequence(SequenceSpec("one", (1,), 1, None, Sampling(), max_tokens=5))
    thread.run_step([StepItem("one", 1, new_blocks=(0,))], ended.set_result)
    result = await asyncio.wait_for(ended, 5)
    assert isinstance(result.error, ArithmeticError)
    assert result.results == []
    await thread.stop()


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALUMMA_WORKER_MAX_REQUESTS", "7")
    monkeypatch.setenv("CALUMMA_WORKER_THREADS", "3")
    settings = load_settings(WorkerSettings, ["--threads=1", "--engine=simulated"])
    assert (settings.max_requests, settings.threads, settings.engine) == (7, 1, "simulated")
    assert settings.thread_count == 1
    assert settings.worker_id != load_settings(WorkerSettings, []).worker_id


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_gives_its_replica(name: str) -> None:
    replica = WorkerSettings(system=name, adapter_loads=6).replica()
    assert replica == replace(SYSTEMS[name].replica, max_loads=6, max_hint_loads=3)


def test_what_is_set_beside_a_system_wins() -> None:
    argv = ["--system=slora", "--reserve=quantile", "--keeps-idle-adapters", "--stepping=chunked"]
    replica = load_settings(WorkerSettings, [*argv, "--prefill-tokens-per-step=64"]).replica()
    assert (replica.reserve, replica.keeps_idle_adapters) == (Reserve.QUANTILE, True)
    assert (replica.stepping, replica.prefill_tokens_per_step) == ("chunked", 64)
    assert replica.admission_every_steps == SYSTEMS["slora"].replica.admission_every_steps


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--system=magic"], "no 'magic'; the systems are: adaptive, "),
        (["--eviction=magic"], "unknown eviction policy 'magic', have lru"),
        (["--tbt-target-s=0"], "tbt_target_s: "),
        (["--step-tokens-limit=8"], "min_prefill_tokens is above step_tokens_limit"),
    ],
)
def test_a_system_that_cannot_work_is_refused_with_the_reason(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_settings(WorkerSettings, argv)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--threads=0", "--scheduler=nowhere", "--dtype=int3", "--nope=1"])
def test_a_bad_setting_ends_the_process_with_code_2(flag: str) -> None:
    with pytest.raises(SystemExit) as end:
        load_settings(WorkerSettings, [flag])
    assert end.value.code == 2


def test_a_worker_on_all_interfaces_must_say_what_gateways_dial() -> None:
    with pytest.raises(ValidationError, match="needs advertise"):
        WorkerSettings(listen="0.0.0.0:7102")
    assert WorkerSettings(listen="0.0.0.0:7102", advertise="here:7102").advertise == "here:7102"
