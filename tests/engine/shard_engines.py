"""Engines of two shards on the CPU, for tests: each is one process beside this one."""

from pathlib import Path

import torch

from services.worker.engine import EngineSettings, SequenceSpec
from services.worker.engine.parallel import ParallelEngine, build_parallel_engine
from tests.engine.engine_support import DType, OwnedEngine, distribution, generate, token_ids


def two_shards(folder: Path, *, dtype: DType = "float32", timeout_s: float = 60.0) -> OwnedEngine:
    settings = EngineSettings(
        model=folder, dtype=dtype, tensor_parallel=2, threads=2, memory_bytes=2**22
    )
    return OwnedEngine(build_parallel_engine(settings, folder, timeout_s=timeout_s))


def close(engine: OwnedEngine) -> None:
    assert isinstance(engine.engine, ParallelEngine)
    engine.engine.close()


def shard_pids(engine: OwnedEngine) -> list[int]:
    assert isinstance(engine.engine, ParallelEngine)
    return [peer.process.pid for peer in engine.engine._shards._team.peers]


def exists(pid: int) -> bool:
    """As a process that runs: one that has ended, and that nobody waited for, does not count."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def assert_equal(
    ours: OwnedEngine, reference: OwnedEngine, specs: list[SequenceSpec], **options: int
) -> None:
    outputs, expected = generate(ours, specs, **options), generate(reference, specs)
    for name, output in outputs.items():
        assert token_ids(output) == token_ids(expected[name]), name
        for one, other in zip(output, expected[name], strict=True):
            torch.testing.assert_close(distribution(one), distribution(other), atol=1e-3, rtol=0)
    ours.check_integrity()
