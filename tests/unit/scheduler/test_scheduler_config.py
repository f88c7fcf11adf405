"""Settings come from flags and environment, bounded; the process starts and drains."""

import os
import re
import signal
import subprocess
import sys

import pytest

from services.common.config import load_settings
from services.scheduler.config import SchedulerSettings


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALUMMA_SCHEDULER_POLICY", "fifo")
    monkeypatch.setenv("CALUMMA_SCHEDULER_QUEUE_LIMIT", "7")
    settings = load_settings(SchedulerSettings, ["--queue-limit", "9", "--worker-grace-s", "1.5"])
    assert (settings.policy, settings.queue_limit, settings.worker_grace_s) == ("fifo", 9, 1.5)
    assert settings.listen == "127.0.0.1:7101"
    assert settings.recipe().cluster.queue_limit == 9


@pytest.mark.parametrize(
    "argv", [["--policy", "magic"], ["--queue-limit", "0"], ["--no-such-flag"], ["--listen", "x"]]
)
def test_a_wrong_flag_ends_with_code_2_and_a_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(SchedulerSettings, argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip()


def test_the_process_listens_and_ends_on_sigterm() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "gen"))}
    command = [sys.executable, "-m", "services.scheduler", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--log-format", "json"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert re.search(r'"address": "127\.0\.0\.1:\d+"', first), first
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert '"event": "stopped"' in rest
    finally:
        process.kill()
        process.wait()
