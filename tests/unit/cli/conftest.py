"""Fake services and the command line in one process."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from calumma.adapter_store.v1 import adapter_store_pb2_grpc
from calumma.gateway.v1 import gateway_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2_grpc
from calumma.worker.v1 import worker_pb2_grpc
from services.cli.app import app
from tests.unit.cli import fake_services as fakes

Run = Callable[..., Result]


@pytest.fixture
def inference() -> fakes.FakeInference:
    return fakes.FakeInference()


@pytest.fixture
def gateway(inference: fakes.FakeInference) -> Iterator[str]:
    register = partial(gateway_pb2_grpc.add_InferenceServiceServicer_to_server, inference)
    with fakes.served(fakes.INFERENCE, register) as address:
        yield address


@pytest.fixture
def store() -> fakes.FakeStore:
    return fakes.FakeStore("alpha", "beta", "gamma")


@pytest.fixture
def store_address(store: fakes.FakeStore) -> Iterator[str]:
    register = partial(adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server, store)
    with fakes.served(fakes.STORE, register) as address:
        yield address


@pytest.fixture
def worker_address() -> Iterator[str]:
    register = partial(worker_pb2_grpc.add_WorkerServiceServicer_to_server, fakes.FakeWorker())
    with fakes.served(fakes.WORKER, register) as address:
        yield address


@pytest.fixture
def scheduler(worker_address: str) -> fakes.FakeScheduler:
    return fakes.FakeScheduler(worker_address)


@pytest.fixture
def scheduler_address(scheduler: fakes.FakeScheduler) -> Iterator[str]:
    register = partial(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, scheduler)
    with fakes.served(fakes.SCHEDULER, register) as address:
        yield address


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    return partial(CliRunner().invoke, app)


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(2**20))
    return folder


def last_json(result: Result) -> Any:
    """The one object on stdout."""
    (line,) = result.stdout.splitlines()
    return json.loads(line)
