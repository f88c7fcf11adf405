"""A worker beside the suite's own, whose adapters come over a link; the suite's own is drained."""

import contextlib
import sys
from collections.abc import Generator, Mapping
from typing import Any, Final

import grpc

from bench.coldstart.link import Link, RunningLink, running_link
from bench.suite import LoggedProcess, Suite
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc

_DRAIN_S_MAX: Final = 60.0
_READY_S_MAX: Final = 180.0


class LinkedWorker(LoggedProcess):
    """A worker that reaches the suite's adapter store over a link, attached to its scheduler."""

    def __init__(self, suite: Suite, link: RunningLink, env: Mapping[str, str]) -> None:
        flags = (
            "--listen=127.0.0.1:0",
            f"--scheduler={suite.endpoints['scheduler']}",
            f"--adapter-store={link.address}",
            "--log-format=json",
            "--device=cpu",
        )
        super().__init__([sys.executable, "-m", "services.worker", *flags], env=env)
        self.link = link
        try:
            self.wait_for(lambda event: event.get("event") == "attached", _READY_S_MAX)
        except TimeoutError:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid


@contextlib.contextmanager
def linked_worker(suite: Suite, link: Link, env: Mapping[str, str]) -> Generator[LinkedWorker]:
    """Such a worker with settings from `env`, stopped at the end."""
    with running_link(link, str(suite.endpoints["adapter_store"])) as running:
        worker = LinkedWorker(suite, running, env)
        try:
            yield worker
        finally:
            worker.stop()


def drain_own_worker(suite: Suite) -> None:
    """The suite's own worker takes no requests from now on."""
    with grpc.insecure_channel(str(suite.endpoints["workers"][0])) as channel:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)
        stub.Drain(worker_pb2.DrainRequest(), timeout=_DRAIN_S_MAX)
