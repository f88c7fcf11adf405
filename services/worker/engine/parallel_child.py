"""The process of one shard but the first: `python -m …` with the numbers of its connections.

It does what shard 0 tells it, and ends with it: at the end of either connection, wherever it is.
The main thread computes steps; adapters come in on a thread of their own, as in shard 0. When it
fails it writes why to a third descriptor, and ends.
"""

import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final, Never

import torch

from services.worker.engine.api import AdapterIncompatibleError
from services.worker.engine.executor import Executor, Pass
from services.worker.engine.parallel import build_shard
from services.worker.engine.parallel_memory import receive
from services.worker.engine.parallel_wire import (
    BeginAdapter,
    ClearBlocks,
    Done,
    ExtendAdapter,
    Joining,
    Ready,
    RemoveAdapter,
    Run,
    Start,
    unpack,
)

_WORDS_BYTES_MAX: Final = 4096  # what a pipe takes at once


def main() -> None:
    """Exit codes: 0 when shard 0 let go, 1 after a failure."""
    steps, adapters = (Connection(int(number)) for number in sys.argv[1:3])
    start: Start | None = None
    try:
        start = steps.recv()
        assert start is not None
        steps.send(Joining())
        executor = build_shard(start)
        loader = threading.Thread(target=_serve_adapters, args=(executor, adapters, start))
        loader.start()
        steps.send(Ready())
        _StepServer(executor, steps).serve()
    except (EOFError, ConnectionError):
        _let_go(start)
    except Exception as error:  # noqa: BLE001 - shard 0 says what it was
        os.write(int(sys.argv[3]), _text(error).encode()[:_WORDS_BYTES_MAX])
        _exit(1)


class _StepServer:
    """The shard's passes under way are kept by their numbers."""

    def __init__(self, executor: Executor, steps: Connection) -> None:
        self._executor = executor
        self._steps = steps
        self._passes: dict[int, Pass] = {}

    def serve(self) -> Never:
        while True:
            match self._steps.recv():
                case Run() as run:
                    self._run(run)
                case ClearBlocks(blocks):
                    self._executor.clear_blocks(blocks)
                case RemoveAdapter(digest):
                    self._executor.remove_adapter(digest)
                    self._steps.send(Done())
                case unknown:
                    raise TypeError(f"{unknown!r} is no message of a step")

    def _run(self, run: Run) -> None:
        for number in run.dropped:
            self._passes.pop(number, None)
        for call in run.calls:
            if call.rows is not None:
                self._passes[call.number] = unpack(call.rows)
        passes = [self._passes[call.number] for call in run.calls]
        self._executor.run(passes, [call.until_layer for call in run.calls])
        for call, rows in zip(run.calls, passes, strict=True):
            if rows.state is None:  # it has passed all layers
                del self._passes[call.number]


def _serve_adapters(executor: Executor, adapters: Connection, start: Start) -> Never:
    try:
        while True:
            match adapters.recv():
                case BeginAdapter(digest, header, blocks):
                    memory = receive(adapters, header.payload_bytes)
                    adapters.send(_outcome(executor.begin_adapter, digest, header, memory, blocks))
                    del memory
                case ExtendAdapter(digest, layers):
                    adapters.send(_outcome(executor.extend_adapter, digest, layers))
                case unknown:
                    adapters.send(Done(("lost", f"{unknown!r} is no message about an adapter")))
    except (EOFError, ConnectionError):
        _let_go(start)
    except OSError:  # memory that can't be mapped
        traceback.print_exc()
        _exit(1)


def _outcome(call: Callable[..., None], *arguments: object) -> Done:
    try:
        call(*arguments)
    except AdapterIncompatibleError as error:
        return Done(("incompatible", str(error)))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Done(("memory", str(error)))
    except Exception as error:  # noqa: BLE001 - shard 0 judges it
        return Done(("lost", _text(error)))
    return Done()


def _text(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.name}, line {frame.lineno})"


def _let_go(start: Start | None) -> Never:
    """Shard 0 has ended, perhaps without having cleared up."""
    if start is not None:
        shutil.rmtree(start.meeting_point.parent, ignore_errors=True)
    _exit(0)


def _exit(code: int) -> Never:
    """At once: other threads may be waiting for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
