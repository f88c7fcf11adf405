"""Times of work on the device: each a graph of its own, replayed by turns in one process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.gpu.extent import Extent

Work = Callable[[], None]
_WARM_UP_RUNS = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. The spread is that of two halves of the turns: the larger median over the other."""

    median_s: float
    spread: float


def by_turns(works: Mapping[str, Work], extent: Extent) -> dict[str, Times]:
    """Median times of each, taken alternately."""
    if extent.is_gpu:
        replays = {name: captured(work) for name, work in works.items()}
    else:
        replays = dict(works)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(max(2, extent.replays)):
        for name, replay in replays.items():
            taken[name].append(_timed_s(replay, extent))
    return {name: _times(seconds) for name, seconds in taken.items()}


def captured(work: Work) -> Work:
    """The work as a CUDA graph, after a few runs that compile and allocate."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


def _timed_s(work: Work, extent: Extent) -> float:
    if not extent.is_gpu:
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _times(seconds: list[float]) -> Times:
    half = len(seconds) // 2
    first, second = np.median(seconds[:half]), np.median(seconds[half:])
    return Times(float(np.median(seconds)), float(max(first, second) / min(first, second)))
