"""`calumma up` with the real services and the simulated engine, and the other commands on it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import grpc
import pytest

from bench.suite import free_port_base
from tests.support.reflected import Reflected
from tests.support.suite_process import (
    SuiteProcess,
    default_model_folder,
    is_alive,
    running_suite,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the example adapters, and one that no store takes."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("sentiment", "iso-date"):
        shutil.copytree(EXAMPLES / name, folder / name)
    shutil.copy(EXAMPLES / "scores.json", folder)
    broken = folder / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    (broken / "adapter_model.safetensors").write_bytes(b"not a tensor")
    return folder


@pytest.fixture(scope="module")
def suite(home: Path, adapters: Path) -> Generator[SuiteProcess]:
    options = [f"--model={default_model_folder()}", f"--adapters={adapters}", "--engine=simulated"]
    with running_suite(home, *options) as suite:
        suite.read_until("ready")
        yield suite


def test_ready_names_the_endpoints_the_adapters_and_commands_to_try(suite: SuiteProcess) -> None:
    ready = suite.lines[-1]
    base = suite.port_base
    assert ready["endpoints"] == {
        "gateway": f"127.0.0.1:{base}",
        "scheduler": f"127.0.0.1:{base + 1}",
        "adapter_store": f"127.0.0.1:{base + 3}",
        "workers": [f"127.0.0.1:{base + 2}"],
    }
    assert ready["adapters"] == ["iso-date", "sentiment"]
    assert ready["commands"][0].startswith(f"calumma --gateway 127.0.0.1:{base} generate -a ")
    assert len(ready["commands"]) == 3


def test_a_refused_adapter_is_reported_and_the_others_are_published(suite: SuiteProcess) -> None:
    (refusal,) = [line for line in suite.lines if line["event"] == "not_published"]
    assert (refusal["adapter"], refusal["level"]) == ("broken", "warning")
    listed = json.loads(suite.command("adapters", "list", "--json").stdout)
    assert [adapter["name"] for adapter in listed["adapters"]] == ["iso-date", "sentiment"]


def test_every_service_logs_json_through_up(suite: SuiteProcess) -> None:
    speakers = {line["service"] for line in suite.lines}
    assert {"up", "gateway", "scheduler", "worker"} <= speakers
    assert all("timestamp" in line for line in suite.lines)


def test_generate_answers_with_an_adapter(suite: SuiteProcess) -> None:
    options = ["--max-tokens", "5", "--seed", "3", "--json"]
    result = suite.command("generate", "-a", "sentiment@1", *options, "Good.")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["adapter_name"], answer["adapter_version"]) == ("sentiment", 1)
    assert 1 <= answer["output_tokens"] <= 5
    assert answer["seed"] == 3


def test_a_chat_streams_turn_after_turn(suite: SuiteProcess) -> None:
    result = suite.command("chat", "--max-tokens", "4", text="one\n/adapter sentiment\ntwo\n")
    assert result.returncode == 0, result.stderr
    assert "base model" in result.stderr
    assert "sentiment@1" in result.stderr


def test_an_unknown_adapter_is_an_error_with_a_hint(suite: SuiteProcess) -> None:
    result = suite.command("generate", "-a", "nope", "hi")
    assert result.returncode == 1
    assert "reason: ADAPTER_NOT_FOUND" in result.stderr
    assert "hint: `calumma adapters list`" in result.stderr


def test_adapters_can_be_published_named_and_deleted(suite: SuiteProcess) -> None:
    publish = ("adapters", "publish", str(EXAMPLES / "sentiment"), "--name", "again")
    published = json.loads(suite.command(*publish, "--alias", "prod", "--json").stdout)
    assert published["already_published"] is False
    repeated = json.loads(suite.command(*publish, "--json").stdout)
    assert repeated["already_published"] is True
    shown = json.loads(suite.command("adapters", "show", "again@prod", "--json").stdout)
    assert (shown["resolved_version"], shown["aliases"]) == (1, {"prod": 1})
    aliased = suite.command("adapters", "alias", "again", "canary", "1", "--json")
    assert json.loads(aliased.stdout)["aliases"] == {"prod": 1, "canary": 1}
    unaliased = suite.command("adapters", "unalias", "again", "prod", "--json")
    assert json.loads(unaliased.stdout)["aliases"] == {"canary": 1}
    assert suite.command("adapters", "delete", "again", "--yes").returncode == 0
    assert suite.command("adapters", "show", "again").returncode == 1


def test_status_sees_the_whole_suite(suite: SuiteProcess) -> None:
    result = suite.command("status", "--json")
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    assert status["healthy"] is True
    (worker,) = status["workers"]
    assert worker["engine"].startswith("simulated")
    assert worker["pool_blocks"] > 0


def test_the_grpcurl_way_works_on_every_service(suite: SuiteProcess) -> None:
    names = {
        0: "calumma.gateway.v1.InferenceService",
        1: "calumma.scheduler.v1.SchedulerService",
        2: "calumma.worker.v1.WorkerService",
        3: "calumma.adapter_store.v1.AdapterStoreService",
    }
    for offset, name in names.items():
        with grpc.insecure_channel(f"127.0.0.1:{suite.port_base + offset}") as channel:
            reflected = Reflected(channel)
            assert {name, "grpc.health.v1.Health"} <= set(reflected.services())
            reflected.load(name)
            assert reflected.pool.FindServiceByName(name).methods


def test_a_worker_that_dies_is_started_again(suite: SuiteProcess) -> None:
    started = [line for line in suite.lines if line["event"] == "started"]
    (pid,) = [line["pid"] for line in started if line.get("process") == "worker"]
    os.kill(pid, signal.SIGKILL)
    died = suite.read_until("died", process="worker")
    assert died["exit_code"] == -signal.SIGKILL
    suite.read_until("started", process="worker")
    result = suite.command("generate", "--max-tokens", "3", "Good.")
    assert result.returncode == 0, result.stderr


def test_ctrl_c_drains_and_leaves_no_process_behind(home: Path, adapters: Path) -> None:
    """Runs on the home of the suite above: what is published there already is recognised."""
    options = [f"--model={default_model_folder()}", f"--adapters={adapters}", "--engine=simulated"]
    with running_suite(home, *options, workers=2) as suite:
        suite.read_until("ready")
        listed = json.loads(suite.command("adapters", "list", "--json").stdout)
        assert {len(adapter["versions"]) for adapter in listed["adapters"]} == {1}
        assert len(json.loads(suite.command("status", "--json").stdout)["workers"]) == 2
        assert suite.end(signal.SIGINT) == 0
    assert len(suite.pids()) == 5
    assert not any(is_alive(pid) for pid in suite.pids())
    stopped = [line["service"] for line in suite.lines if line["event"] == "stopped"]
    assert stopped[-1] == "up"
    assert stopped[0] == "gateway"


def test_a_second_ctrl_c_ends_running_work_at_once(tmp_path: Path) -> None:
    options = [f"--model={default_model_folder()}", "--no-adapters", "--engine=simulated"]
    with running_suite(tmp_path, *options, "--grace=60") as suite:
        suite.read_until("ready")
        command = [sys.executable, "-m", "services.cli", *suite.options, "generate"]
        arguments = ["--max-tokens", "1000", "--seed", "1", "Tell me everything."]
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe) as request:
            assert request.stdout is not None
            assert request.stdout.read(1)  # it has begun
            before_s = time.monotonic()
            assert suite.end(times=2) == 0
            assert time.monotonic() - before_s < 5
            request.communicate(timeout=20)
        assert request.returncode == 1
    assert not any(is_alive(pid) for pid in suite.pids())


def test_services_do_not_outlive_an_up_that_is_killed(tmp_path: Path) -> None:
    options = [f"--model={default_model_folder()}", "--no-adapters", "--engine=simulated"]
    with running_suite(tmp_path, *options) as suite:
        suite.read_until("ready")
        suite.process.kill()
        suite.process.wait(10)
        deadline_s = time.monotonic() + 10
        while any(is_alive(pid) for pid in suite.pids()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert not any(is_alive(pid) for pid in suite.pids())


def test_a_service_that_dies_at_start_stops_everything_with_1(tmp_path: Path) -> None:
    options = [f"--model={default_model_folder()}", "--no-adapters", "--engine=imaginary"]
    with running_suite(tmp_path, *options) as suite:
        assert suite.process.stdout is not None
        suite.lines.extend(json.loads(line) for line in suite.process.stdout)
        assert suite.process.wait(30) == 1
    error = suite.lines[-1]["error"]
    assert error["message"] == "worker died at start with exit code 2"
    assert "engine" in error["hint"]
    assert not any(is_alive(pid) for pid in suite.pids())


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    base = free_port_base()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", base + 1))
        other.listen()
        options = [f"--port-base={base}", f"--home={tmp_path}", f"--model={default_model_folder()}"]
        result = subprocess.run(
            [sys.executable, "-m", "services.cli", "up", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 1
    assert f"port {base + 1} for the scheduler is taken" in result.stderr
    assert "--port-base" in result.stderr
    assert result.stdout == ""
