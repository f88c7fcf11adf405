"""`calumma status`, `model` and `version`."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run, last_json


@pytest.fixture
def suite(
    gateway: str, scheduler_address: str, store_address: str, worker_address: str
) -> list[str]:
    addresses = ["--gateway", gateway, "--scheduler", scheduler_address]
    return [*addresses, "--adapter-store", store_address, "--worker", worker_address]


def test_status_shows_services_queues_pool_and_resident_adapters(
    run: Run, suite: list[str]
) -> None:
    result = run([*suite, "status"])
    assert result.exit_code == 0, result.output
    assert "unreachable" not in result.stdout
    assert "queues (chameleon in tuned) · 1 waiting · gateways: 1" in result.stdout
    assert "small: 1, oldest 500 ms · 1,200 of 4,000 tokens out · sizes below 384" in result.stdout
    assert "idle" not in result.stdout
    assert "the oldest wait for: memory 1" in result.stdout
    assert (
        "tenant acme: 2 requests · 250 tokens/s · -30 available · 4 held by its quotas"
        in result.stdout
    )
    assert "r-9 waits 500 ms for memory" in result.stdout
    assert "running 3/32 · loading 1 · step 20 ms · 12,345 tokens so far" in result.stdout
    assert "KV 40% adapters 10% free 50% of 100.0 MiB" in result.stdout
    assert "1 (3.3 MiB) on the device · 1 (3.3 MiB) in host memory · 1 pinned" in result.stdout
    assert "75% of 12 requests found theirs on the device" in result.stdout
    assert "device, host" in result.stdout
    assert "2 running" in result.stdout
    assert "pinned: first in demos" in result.stdout


def test_status_as_json_has_documented_fields(run: Run, suite: list[str]) -> None:
    status = last_json(run([*suite, "status", "--json"]))
    assert set(status) == {
        "healthy",
        "services",
        "system",
        "policy",
        "gateways",
        "queues",
        "tenants",
        "queued",
        "workers",
    }
    assert status["healthy"] is True
    assert {s["service"]: s["state"] for s in status["services"]} == {
        "gateway": "serving",
        "scheduler": "serving",
        "adapter_store": "serving",
    }
    small, idle = status["queues"]
    assert (small["quota_tokens"], small["used_tokens"], small["size_limit"]) == (4000, 1200, 384)
    assert (idle["quota_tokens"], idle["size_limit"]) == (None, None)
    (tenant,) = status["tenants"]
    assert (tenant["tenant"], tenant["held"], tenant["tokens_per_s"]) == ("acme", 4, 250)
    (worker,) = status["workers"]
    assert worker["state"] == "serving"
    assert (worker["pool_blocks"], worker["kv_blocks"], worker["adapter_blocks"]) == (100, 40, 10)
    (resident,) = worker["adapters"]
    assert resident["name"] in {"alpha@1", "beta@1", "gamma@1"}  # all have these weights
    assert (resident["tier"], resident["in_host"]) == ("device", True)
    assert (resident["pin_reason"], resident["num_layers"]) == ("first in demos", None)
    cache = worker["cache"]
    assert (cache["hits"], cache["misses"], cache["hit_rate"]) == (9, 3, 0.75)
    assert cache["downloaded_bytes"] == 7


def test_a_service_that_is_down_is_shown_and_ends_with_1(run: Run, suite: list[str]) -> None:
    result = run([*suite, "--gateway", "127.0.0.1:1", "status", "--json"])
    assert result.exit_code == 1
    status = json.loads(result.stdout)
    assert status["healthy"] is False
    assert status["services"][0] == {
        "service": "gateway",
        "address": "127.0.0.1:1",
        "state": "unreachable",
    }


def test_without_a_scheduler_the_usual_worker_is_still_looked_at(
    run: Run, suite: list[str]
) -> None:
    result = run([*suite, "--scheduler", "127.0.0.1:1", "status", "--json"])
    assert result.exit_code == 1
    (worker,) = json.loads(result.stdout)["workers"]
    assert (worker["worker_id"], worker["state"]) == ("w-1", "detached")


def test_watch_refreshes_until_ctrl_c(suite: list[str]) -> None:
    command = [sys.executable, "-m", "services.cli", *suite, "status", "--watch", "--json"]
    process = subprocess.Popen(
        [*command, "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    snapshots = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors == ""
    assert all(snapshot["healthy"] for snapshot in snapshots)


def test_version_is_printed(run: Run) -> None:
    assert run(["version"]).stdout.startswith("calumma ")
    assert set(last_json(run(["version", "--json"]))) == {"version"}


def test_a_model_that_is_not_there_is_explained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALUMMA_HOME", str(tmp_path))
    result = run(["model", "show", "org/nothing"])
    assert result.exit_code == 1
    assert "calumma model pull org/nothing" in result.stderr


def test_model_show_describes_a_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALUMMA_HOME", str(tmp_path))
    folder = _tiny_model(tmp_path / "tiny")
    shown = last_json(run(["model", "show", str(folder), "--json"]))
    assert set(shown) == {"name", "digest", "folder", "weights_bytes", "config"}
    assert shown["config"]["num_layers"] == 2
    assert "2 layers" in run(["model", "show", str(folder)]).stdout


def _tiny_model(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(16))
    (folder / "tokenizer.json").write_text("{}")
    return folder
