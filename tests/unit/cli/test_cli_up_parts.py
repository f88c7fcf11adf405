"""What `calumma up` is made of, without a process: plan, log lines, examples."""

import io
import json
import socket
from pathlib import Path

import pytest
from rich.console import Console

from services.cli.examples import find_examples, sample_prompts
from services.cli.log_view import LogView
from services.cli.output import CommandError
from services.cli.plan import Endpoints, Plan, check_ports, process_specs
from tests.unit.cli.conftest import Run


def plan(**changes: object) -> Plan:
    settings = {
        "model": "org/model",
        "endpoints": Endpoints.on_loopback(7100, 1),
        "home": None,
        "engine": None,
        "device": None,
        "dtype": None,
        "system": None,
        "policy": None,
        "grace_s": 10.0,
        "log_level": "info",
        **changes,
    }
    return Plan(**settings)  # type: ignore[arg-type]


def test_processes_start_after_what_they_dial() -> None:
    names = [spec.name for spec in process_specs(plan())]
    assert names == ["adapter_store", "scheduler", "worker", "gateway"]


def test_each_process_gets_its_settings_and_no_others() -> None:
    specs = process_specs(
        plan(engine="simulated", system="slora", policy="fifo", home=Path("/cache"))
    )
    store, scheduler, worker, gateway = (spec.argv[6:] for spec in specs)
    common = ("--log-format=json", "--log-level=info", "--grace-s=10")
    assert store == ("--listen=127.0.0.1:7103", *common, "--model=org/model")
    assert scheduler == ("--listen=127.0.0.1:7101", *common, "--system=slora", "--policy=fifo")
    peers = ("--scheduler=127.0.0.1:7101", "--adapter-store=127.0.0.1:7103", "--model=org/model")
    how = ("--system=slora", "--engine=simulated")
    assert worker == ("--listen=127.0.0.1:7102", *common, *peers, *how)
    assert gateway == ("--listen=127.0.0.1:7100", *common, *peers)
    assert specs[0].env["CALUMMA_HOME"] == "/cache"


@pytest.mark.parametrize("option", ["system", "policy"])
def test_an_unknown_system_or_policy_is_refused_before_anything_starts(
    run: Run, option: str
) -> None:
    result = run(["up", f"--{option}", "magic", "--model", "no/model"])
    assert result.exit_code == 1
    assert f"there is no {option} 'magic'" in result.stderr
    assert "chameleon" in result.stderr


def test_more_workers_listen_after_the_usual_ports() -> None:
    endpoints = Endpoints.on_loopback(8000, 3)
    assert endpoints.workers == ("127.0.0.1:8002", "127.0.0.1:8004", "127.0.0.1:8005")
    names = [name for name, _ in endpoints.labelled()]
    assert names == ["adapter_store", "scheduler", "worker-1", "worker-2", "worker-3", "gateway"]


def test_commands_to_try_quote_prompts_and_name_unusual_addresses() -> None:
    usual = Endpoints.on_loopback(7100, 1).commands_to_try({"tone": "it's late"})
    assert usual == (
        "calumma generate -a tone 'it'\"'\"'s late'",
        "calumma generate 'Name three rivers.'",
        "calumma chat",
    )
    moved = Endpoints.on_loopback(8000, 1).commands_to_try({})
    assert moved[0].startswith("calumma --gateway 127.0.0.1:8000 generate ")
    assert moved[2].endswith("--adapter-store 127.0.0.1:8003 status")


def test_a_taken_port_is_named_with_its_service() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port} for the scheduler is taken"):
            check_ports(Endpoints.on_loopback(port - 1, 1))


def shown(*lines: str, as_json: bool = False) -> str:
    stream = io.StringIO()
    view = LogView(Console(file=stream, width=200), as_json=as_json)
    for line in lines:
        view.line("worker", line)
    return stream.getvalue()


def test_a_log_line_is_aligned_and_its_values_are_readable() -> None:
    record = {
        "timestamp": "2026-01-02T03:04:05.678900Z",
        "level": "info",
        "event": "rpc",
        "service": "worker",
        "method": "Get",
        "why": "two words",
        "count": 3,
    }
    (line,) = shown(json.dumps(record)).splitlines()
    assert line[12:] == ' worker        info    rpc method=Get why="two words" count=3'


def test_an_exception_follows_its_line() -> None:
    record = {"level": "error", "event": "unhandled", "exception": "Traceback:\n  boom"}
    assert shown(json.dumps(record)).splitlines()[1:] == ["Traceback:", "  boom"]


def test_a_line_that_is_not_json_is_shown_without_control_characters() -> None:
    assert shown("plain \x1b[31mred", "", '["a list"]').count("\n") == 2
    assert "\x1b" not in shown("plain \x1b[31mred")


def test_with_json_every_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    known = '{"timestamp": "2026-01-02T03:04:05Z", "event": "x"}'
    shown(known, "a bare line", as_json=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == known
    wrapped = json.loads(second)
    assert (wrapped["service"], wrapped["event"]) == ("worker", "a bare line")
    assert "timestamp" in wrapped


def test_examples_are_found_by_their_files_and_prompted_from_their_scores(tmp_path: Path) -> None:
    for name in ("b", "a", "incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        if name != "incomplete":
            (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "scores.json").write_text(
        json.dumps({"a": {"sample_prompt": "do it"}, "b": {"sample_prompt": "x" * 500}})
    )
    folders = find_examples(tmp_path)
    assert list(folders) == ["a", "b"]
    assert sample_prompts(folders, folders) == {"a": "do it"}


def test_no_examples_is_not_an_error(tmp_path: Path) -> None:
    assert find_examples(tmp_path / "nowhere") == {}
    folders = {"a": tmp_path / "a"}
    assert sample_prompts(["a"], folders) == {}
