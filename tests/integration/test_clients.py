"""Clients in other languages and without generated code, against a server that speaks the proto."""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory

from calumma.gateway.v1 import gateway_pb2_grpc
from tests.support.reflected import Reflected
from tests.support.suite_process import default_model_folder, running_suite
from tests.unit.cli.fake_services import INFERENCE, FakeInference, served

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "examples" / "clients"


@pytest.fixture
def gateway() -> Generator[str]:
    register = partial(gateway_pb2_grpc.add_InferenceServiceServicer_to_server, FakeInference())
    with served(INFERENCE, register) as address:
        yield address


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The Node client with its packages, in a folder of its own."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(CLIENTS / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    try:
        subprocess.run(
            [npm, "install", *options], cwd=folder, check=True, capture_output=True, timeout=120
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm could not install the packages: {str(error.stderr)[-300:]}")
    return [node, str(folder / "generate_stream.mjs")]


def run_client(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CALUMMA_PROTOS": str(ROOT / "protos")}
    return subprocess.run(
        [*command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_node_client_streams_an_answer(node_client: list[str], gateway: str) -> None:
    result = run_client(node_client, gateway, "billing", "one two three")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "three two one\n"
    assert result.stderr == "3 tokens, FINISH_REASON_STOP, worker w-1\n"


def test_the_node_client_reads_the_stable_reason(node_client: list[str], gateway: str) -> None:
    result = run_client(node_client, gateway, "none", "hi")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "NOT_FOUND: no adapter is called none",
        'ADAPTER_NOT_FOUND {"field":"adapter"}',
    ]


PYTHON_CLIENT = [sys.executable, str(CLIENTS / "python" / "generate_stream.py")]


def test_the_python_client_streams_an_answer(gateway: str) -> None:
    result = run_client(PYTHON_CLIENT, gateway, "", "one two three")
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("three two one\n", "3 tokens\n")


def test_the_python_client_reads_the_stable_reason(gateway: str) -> None:
    result = run_client(PYTHON_CLIENT, gateway, "none", "hi")
    assert result.returncode == 1
    assert "ADAPTER_NOT_FOUND {'field': 'adapter'}" in result.stderr


def call_generate_by_reflection(address: str, *, adapter: str, prompt: str) -> Any:
    """Response of Generate, called with nothing but what the server says about itself."""
    with grpc.insecure_channel(address) as channel:
        reflected = Reflected(channel)
        assert INFERENCE in reflected.services()
        reflected.load(INFERENCE)
        method = reflected.pool.FindServiceByName(INFERENCE).methods_by_name["Generate"]
        request_class: Any = message_factory.GetMessageClass(method.input_type)
        response_class: Any = message_factory.GetMessageClass(method.output_type)
        request = request_class(adapter=adapter)
        request.chat.messages.add(role="user", content=prompt)
        request.stopping.max_tokens = 5
        call = channel.unary_unary(
            f"/{INFERENCE}/Generate",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return call(request, timeout=30)


def test_reflection_alone_is_enough_to_call_generate(gateway: str) -> None:
    response = call_generate_by_reflection(gateway, adapter="billing", prompt="one two")
    assert response.text == "two one"
    assert response.completion.usage.output_tokens == 2


@pytest.mark.model
def test_all_clients_work_on_a_real_suite(node_client: list[str], tmp_path: Path) -> None:
    options = [f"--model={default_model_folder()}", "--no-adapters", "--engine=simulated"]
    with running_suite(tmp_path, *options) as suite:
        suite.read_until("ready")
        for command in (node_client, PYTHON_CLIENT):
            answered = run_client(command, suite.gateway, "", "Hello")
            assert answered.returncode == 0, answered.stderr
            assert len(answered.stdout) > 1
            refused = run_client(command, suite.gateway, "nobody", "Hello")
            assert refused.returncode == 1
            assert "ADAPTER_NOT_FOUND" in refused.stderr
        response = call_generate_by_reflection(suite.gateway, adapter="", prompt="Hello")
        assert 1 <= response.completion.usage.output_tokens <= 5
