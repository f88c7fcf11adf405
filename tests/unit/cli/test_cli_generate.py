"""`calumma generate` and `calumma chat` against a gateway that speaks the proto."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_services import FakeInference


def test_the_answer_goes_to_stdout_and_its_cost_to_stderr(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "-a", "billing", "one two three"])
    assert result.exit_code == 0
    assert result.stdout == "three two one\n"
    assert "3 tokens · first after 120 ms · 4.0 tok/s" in result.stderr
    assert "billing@1 sha256:ab12ab12ab12 (device) · worker w-1" in result.stderr


def test_the_prompt_is_a_user_message_unless_raw(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    run(["--gateway", gateway, "generate", "--system", "be brief", "hello"])
    run(["--gateway", gateway, "generate", "--raw", "hello"])
    chat, raw = inference.requests
    assert [(m.role, m.content) for m in chat.chat.messages] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]
    assert raw.prompt == "hello"


def test_only_options_that_were_given_are_sent(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    run(["--gateway", gateway, "generate", "hello"])
    options = ["--max-tokens", "5", "--temperature", "0.5", "--seed", "9", "--stop", "x"]
    run(["--gateway", gateway, "generate", *options, "hello"])
    bare, full = inference.requests
    assert not bare.HasField("sampling")
    assert not bare.HasField("stopping")
    assert full.stopping.max_tokens == 5
    assert list(full.stopping.stop) == ["x"]
    assert full.sampling.temperature == 0.5
    assert full.sampling.seed == 9


def test_a_dash_reads_the_prompt_from_stdin(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    result = run(["--gateway", gateway, "generate", "--no-stream", "-"], input="from a pipe\n")
    assert result.stdout == "pipe a from\n"
    assert inference.requests[0].chat.messages[0].content == "from a pipe"


def test_json_is_one_object_with_documented_fields(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "--json", "-a", "billing@2", "one two"])
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "request_id",
        "text",
        "token_ids",
        "finish_reason",
        "adapter_name",
        "adapter_version",
        "adapter_digest",
        "prompt_tokens",
        "output_tokens",
        "predicted_output_tokens",
        "cached_prompt_tokens",
        "timings",
        "worker_id",
        "seed",
        "resubmissions",
    }
    assert (answer["text"], answer["finish_reason"]) == ("two one", "stop")
    assert answer["timings"] == {
        "time_to_first_token_s": 0.12,
        "queue_s": 0.0,
        "adapter_load_s": None,
        "prefill_s": 0.1,
        "decode_s": 0.5,
        "adapter_tier": "device",
    }


def test_the_base_model_has_no_adapter_in_json(run: Run, gateway: str) -> None:
    answer = json.loads(run(["--gateway", gateway, "generate", "--json", "hi"]).stdout)
    assert answer["adapter_digest"] is None
    assert answer["timings"]["adapter_tier"] == "none"


def test_a_failure_shows_message_reason_field_and_hint(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "-a", "none", "hi"])
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines == [
        "error: no adapter is called none",
        "  reason: ADAPTER_NOT_FOUND",
        "  field: adapter",
        "  hint: `calumma adapters list` shows what is published",
    ]


def test_a_failure_with_json_is_an_object_on_stdout(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "--json", "--temperature", "3", "hi"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "error": {
            "message": "temperature is 0 to 2",
            "code": "INVALID_ARGUMENT",
            "reason": "INVALID_FIELD",
            "field": "sampling.temperature",
            "hint": None,
        }
    }


def test_a_retry_delay_becomes_the_hint(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "-a", "busy", "hi"])
    assert "hint: try again in 1.5 s" in result.stderr


def test_a_stream_without_an_end_is_a_failure(run: Run, gateway: str) -> None:
    result = run(["--gateway", gateway, "generate", "-a", "broken", "hi"])
    assert result.exit_code == 1
    assert "ended the stream without a result" in result.stderr


def test_a_gateway_that_is_not_there_is_named(run: Run) -> None:
    result = run(["--gateway", "127.0.0.1:1", "generate", "hi"])
    assert result.exit_code == 1
    assert "the gateway at 127.0.0.1:1 does not answer" in result.stderr
    assert "`calumma up`" in result.stderr


def test_another_service_at_the_address_is_said(run: Run, store_address: str) -> None:
    result = run(["--gateway", store_address, "generate", "hi"])
    assert result.exit_code == 1
    assert "is not the gateway" in result.stderr


def test_a_timeout_is_a_failure_and_cancels_the_request(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    options = ["generate", "-a", "slow", "--timeout", "0.3", "hi"]
    result = run(["--gateway", gateway, *options])
    assert result.exit_code == 1
    assert "took too long" in result.stderr
    assert result.stdout == "hi\n"
    assert inference.cancelled.wait(5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "--max-tokens", "many", "hi"],
        ["generate", "--seed", "-1", "hi"],
        ["generate", "--raw", "--system", "x", "hi"],
        ["status", "--no-such-option"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_ends_with_code_2(run: Run, arguments: list[str]) -> None:
    result = run(arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_text_that_is_not_utf8_is_refused(gateway: str) -> None:
    prompt = os.fsdecode(b"\xff\xfe")
    command = [sys.executable, "-m", "services.cli", "--gateway", gateway, "generate", prompt]
    result = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert result.returncode == 1
    assert b"not valid UTF-8" in result.stderr
    assert b"Traceback" not in result.stderr


def test_an_unexpected_error_shows_no_traceback(
    gateway: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from services.cli import __main__ as entry

    def explode(**_: str) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(entry, "app", explode)
    with pytest.raises(SystemExit) as exit_info:
        entry.main()
    assert exit_info.value.code == 1
    assert "internal error: RuntimeError: boom" in capsys.readouterr().err


def test_ctrl_c_cancels_the_request_and_ends_with_130(
    gateway: str, inference: FakeInference
) -> None:
    command = [sys.executable, "-m", "services.cli", "--gateway", gateway]
    process = subprocess.Popen(
        [*command, "generate", "-a", "slow", "one two"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(7) == "two one"  # it streams: the request has not ended
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert inference.cancelled.wait(5)


def test_escape_sequences_do_not_reach_a_terminal(gateway: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "services.cli", "--gateway", gateway]
    process = subprocess.Popen(
        [*command, "generate", "a\x1b]0;owned\x07b"], stdout=theirs, stderr=subprocess.DEVNULL
    )
    assert process.wait(20) == 0
    os.close(theirs)
    written = os.read(ours, 1000)
    os.close(ours)
    assert written.strip() == b"a]0;ownedb"


def test_a_piped_chat_keeps_the_conversation(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    lines = ["/system be brief", "one two", "/adapter billing", "three four", "/quit", "never"]
    result = run(["--gateway", gateway, "chat"], input="\n".join(lines))
    assert result.exit_code == 0
    assert result.stdout == "two one\nfour three\n"
    first, second = inference.requests
    assert (first.adapter, second.adapter) == ("", "billing")
    assert [(m.role, m.content) for m in second.chat.messages] == [
        ("system", "be brief"),
        ("user", "one two"),
        ("assistant", "two one"),
        ("user", "three four"),
    ]


def test_reset_forgets_the_conversation_and_unknown_commands_are_explained(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    result = run(["--gateway", gateway, "chat"], input="one\n/reset\n/nonsense\ntwo\n")
    assert result.exit_code == 0
    assert "unknown command /nonsense" in result.stderr
    assert [m.content for m in inference.requests[-1].chat.messages] == ["two"]


def test_a_piped_chat_ends_with_1_at_the_first_failure(
    run: Run, gateway: str, inference: FakeInference
) -> None:
    result = run(["--gateway", gateway, "chat", "-a", "none"], input="one\ntwo\n")
    assert result.exit_code == 1
    assert len(inference.requests) == 1


def test_an_interactive_chat_survives_a_failed_turn(gateway: str, inference: FakeInference) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "services.cli", "--gateway", gateway, "chat", "-a", "none"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.write(ours, b"first\n/adapter\nsecond time\n/quit\n")
    assert process.wait(20) == 0
    os.close(theirs)
    screen = b""
    while b"time second" not in screen:
        screen += os.read(ours, 10_000)
    os.close(ours)
    assert b"no adapter is called none" in screen
    assert [m.content for m in inference.requests[-1].chat.messages] == ["second time"]
