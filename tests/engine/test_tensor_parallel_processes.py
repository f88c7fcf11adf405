"""Two shards of other models, what can't be split, and what becomes of shards that are lost."""

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from peft import LoraConfig

from services.common.adapter_container import read_header
from services.worker.engine import (
    AdapterIncompatibleError,
    EngineLostError,
    EngineSettings,
    Sampling,
    StepItem,
    add_adapter,
    build_engine,
)
from services.worker.engine.parallel import ParallelEngine
from services.worker.engine.parallel_shard import ShardingError
from tests.engine.engine_support import (
    TINY_CONFIGS,
    VOCAB,
    generated,
    model_engine,
    spec,
    tiny_model,
)
from tests.engine.peft_blob import one_module_blob
from tests.engine.peft_world import PeftWorld, peft_world, prompt
from tests.engine.shard_engines import assert_equal, close, exists, shard_pids, two_shards

_EVERYTHING = Sampling(logprobs=VOCAB)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    adapters = {"r1": LoraConfig(r=1, lora_alpha=2, target_modules="all-linear")}
    return peft_world(tmp_path_factory.mktemp("world"), adapters)


@pytest.mark.parametrize("name", ["llama with biases", "qwen 3"])
def test_other_models_equal_one_engine(tmp_path: Path, name: str) -> None:
    """Biases are added once, heads are normed each, and the head is a linear of its own."""
    tiny_model(tmp_path, name)
    specs = [spec(f"s{index}", prompt(index), sampling=_EVERYTHING) for index in range(3)]
    engine = two_shards(tmp_path)
    try:
        assert_equal(engine, model_engine(tmp_path), specs)
    finally:
        close(engine)


def test_a_vocabulary_that_does_not_divide_is_split_unevenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = deepcopy(TINY_CONFIGS["qwen 2"])
    odd.vocab_size = VOCAB + 1
    monkeypatch.setitem(TINY_CONFIGS, "odd", odd)
    tiny_model(tmp_path, "odd")
    specs = [spec(f"s{index}", prompt(index)) for index in range(3)]
    engine = two_shards(tmp_path)
    try:
        assert generated(engine, specs) == generated(model_engine(tmp_path), specs)
    finally:
        close(engine)


def test_weights_that_only_the_other_shard_cannot_hold_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = two_shards(tmp_path, dtype="float16")
    try:
        blob = one_module_blob(1.0)
        header = read_header(blob)
        bt = header.payload_offset + header.modules[0].a_bytes("F32")
        last = bt + 4 * (header.modules[0].out_features - 1)  # of the first row of rank
        blob[last : last + 4] = np.float32(7e4).tobytes()
        with pytest.raises(AdapterIncompatibleError, match="not all weights are finite"):
            add_adapter(engine, "overflows", blob)
        add_adapter(engine, "overflows", one_module_blob(1.0))  # nothing was kept of it
        generated(engine, [spec("a", prompt(0), adapter="overflows", max_tokens=2)])
    finally:
        close(engine)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "2 key/value heads can't be split evenly over 3 shards"),
        (5, "6 attention heads can't be split evenly over 5 shards"),
        (17, "17 shards; 2 to 16 are supported"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_name(
    tmp_path: Path, count: int, message: str
) -> None:
    tiny_model(tmp_path)
    with pytest.raises(ShardingError, match=message):
        build_engine(EngineSettings(model=tmp_path, tensor_parallel=count))


def test_compiled_code_is_refused_for_several_shards(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    with pytest.raises(ShardingError, match="several need the torch tier"):
        build_engine(EngineSettings(model=tmp_path, tensor_parallel=2, tier="native"))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (signal.SIGKILL, "shard 1 of 2 ended with code -9"),
        (signal.SIGSTOP, "a step failed at shard 0: .*Timed out"),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_shard_is_a_named_error_and_leaves_nobody_behind(
    world: PeftWorld, sent: signal.Signals, message: str
) -> None:
    engine = two_shards(world.folder, timeout_s=5.0)
    pids = shard_pids(engine)
    told: list[EngineLostError] = []
    assert isinstance(engine.engine, ParallelEngine)
    engine.engine.watch(told.append)
    engine.open_sequence(spec("a", prompt(0)))
    engine.step([StepItem("a", 12)])
    os.kill(pids[0], sent)
    start_s = time.monotonic()
    with pytest.raises(EngineLostError, match=message):
        engine.step([StepItem("a", 1)])
    with pytest.raises(EngineLostError):
        engine.step([StepItem("a", 1)])
    with pytest.raises(EngineLostError):
        add_adapter(engine, *world.blobs["r1"])
    assert len(told) == 1
    close(engine)
    assert time.monotonic() - start_s < 20.0
    assert not any(exists(pid) for pid in pids)


def test_a_failure_at_the_other_shard_comes_with_its_message(world: PeftWorld) -> None:
    engine = two_shards(world.folder)
    assert isinstance(engine.engine, ParallelEngine)
    engine.engine._shards._team.tell("nonsense")
    engine.open_sequence(spec("a", prompt(0)))
    with pytest.raises(EngineLostError, match="shard 1 of 2 failed: TypeError: 'nonsense' is no"):
        engine.step([StepItem("a", 12)])
    close(engine)


def test_a_shard_that_dies_while_nothing_runs_is_noticed(world: PeftWorld) -> None:
    engine = two_shards(world.folder)
    told = Event()
    assert isinstance(engine.engine, ParallelEngine)
    engine.engine.watch(lambda _: told.set())
    os.kill(shard_pids(engine)[0], signal.SIGKILL)
    assert told.wait(20.0)
    close(engine)


def test_closing_ends_all_processes_and_is_no_loss(world: PeftWorld) -> None:
    engine = two_shards(world.folder)
    pids = shard_pids(engine)
    told: list[EngineLostError] = []
    assert isinstance(engine.engine, ParallelEngine)
    engine.engine.watch(told.append)
    close(engine)
    close(engine)
    assert told == []
    assert not any(exists(pid) for pid in pids)


def test_shards_end_when_the_process_of_the_first_is_killed(world: PeftWorld) -> None:
    program = f"""
import os
from pathlib import Path
from services.worker.engine import EngineSettings
from services.worker.engine.parallel import build_parallel_engine
folder = Path({str(world.folder)!r})
engine = build_parallel_engine(EngineSettings(model=folder, tensor_parallel=2, threads=2), folder)
print(engine._shards._team.peers[0].process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=False,
        timeout=100,
    )
    assert done.returncode == -9
    deadline_s = time.monotonic() + 20.0
    while exists(int(done.stdout)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not exists(int(done.stdout))
