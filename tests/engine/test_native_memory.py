"""What the native step costs beside its computation: memory, threads, and others' time."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from services.worker.engine.native_memory import BlockMemory
from tests.engine.engine_support import spec
from tests.engine.native_support import (
    Context,
    compute,
    executor_of,
    medium_model,
    native_engine,
    needs_native,
)


def _resident_bytes(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(kind)


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_memory_is_taken_when_it_is_written_and_can_be_given_back() -> None:
    before = _resident_bytes("RssAnon")
    memory = BlockMemory(100_000, 2**20)  # 98 GiB, more than there is
    blocks = np.frombuffer(memory._memory, dtype=np.uint8).reshape(-1, 2**20)
    blocks[5:37] = 1
    assert 31 * 2**20 < _resident_bytes("RssAnon") - before < 48 * 2**20
    memory.give_back([*range(5, 20), *range(21, 37)])
    assert _resident_bytes("RssAnon") - before < 16 * 2**20
    assert not blocks[5:20].any()
    assert blocks[20].all()
    assert not blocks[21:37].any()


def test_pages_that_blocks_share_stay() -> None:
    memory = BlockMemory(64, 3000)
    blocks = np.frombuffer(memory._memory, dtype=np.uint8).reshape(-1, 3000)
    blocks[:] = 1
    memory.give_back([8, 3, 4, 5, 6, 7, 20])
    kept = [index for index in range(64) if index not in {3, 4, 5, 6, 7, 8, 20}]
    assert blocks[kept].all()
    assert not blocks[5:7].any()


def test_only_blocks_that_were_used_before_need_to_be_cleared() -> None:
    memory = BlockMemory(64, 4096)
    assert memory.use([7, 3]).tolist() == []
    assert memory.use([3, 9, 7]).tolist() == [3, 7]
    assert memory.use([9]).tolist() == [9]


def test_more_than_can_be_addressed_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bytes of memory cannot be mapped"):
        BlockMemory(2**31 - 1, 2**40)


_LOADING = """
import sys, threading
from pathlib import Path
from services.worker.engine import EngineSettings, build_engine

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def build(folder):
    return build_engine(EngineSettings(model=Path(folder), tier="native", threads=1))

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous_bytes())

build(sys.argv[2])  # now all is imported
before = peak = anonymous_bytes()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
engine = build(sys.argv[1])
done.set()
thread.join()
print(anonymous_bytes() - before, peak - before)
"""


@needs_native
def test_a_model_is_held_once(tmp_path: Path) -> None:
    """The saved file is mapped, so that what is anonymous is what was packed."""
    model = medium_model(tmp_path / "large", layers=24)
    medium_model(tmp_path / "small", layers=1)
    model_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    del model
    result = subprocess.run(
        [sys.executable, "-c", _LOADING, str(tmp_path / "large"), str(tmp_path / "small")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    held, peak = map(int, result.stdout.split())
    assert model_bytes > 100 * 2**20
    most = 1.4 * model_bytes  # linears of a few MiB take whole pages of 2 MiB
    assert held < most
    assert peak < most + 2**24


@needs_native
def test_an_engine_that_is_dropped_leaves_no_thread_and_no_memory(tmp_path: Path) -> None:
    medium_model(tmp_path)
    for _ in range(2):  # the first ones start threads of torch's, too
        native_engine(tmp_path, threads=3)
    gc.collect()
    threads, held = _num_threads(), _resident_bytes("RssAnon")
    for _ in range(8):
        native_engine(tmp_path, threads=3)
    gc.collect()
    assert _num_threads() <= threads
    assert _resident_bytes("RssAnon") - held < 2**24  # one model is 12 MiB


@needs_native
def test_other_threads_run_during_a_step(tmp_path: Path) -> None:
    medium_model(tmp_path)
    executor = executor_of(native_engine(tmp_path))
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.01):
            beats.append(time.monotonic())

    context = Context([index % 1000 for index in range(1024)], range(64))
    thread = threading.Thread(target=beat)
    thread.start()
    spans: list[tuple[float, float]] = []
    while sum(end - start for start, end in spans) < 1.0:
        context.computed = 0
        start = time.monotonic()
        compute(executor, [context], layers=2, chunks=(1024,))
        spans.append((start, time.monotonic()))
        context.logits.clear()
    stop.set()
    thread.join()
    gaps = np.diff(beats)
    assert np.median(gaps) < 0.03
    assert len(beats) > 25


@needs_native
def test_nothing_computes_between_steps(tmp_path: Path) -> None:
    medium_model(tmp_path)
    engine = native_engine(tmp_path)
    engine.open_sequence(spec("a", list(range(40))))
    compute(executor_of(engine), [Context(list(range(40)), range(3))], layers=2, chunks=(40,))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
