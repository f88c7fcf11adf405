"""Settings come from flags and environment, bounded; the process starts and drains."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from services.common.config import load_settings
from services.core.policies import POLICIES
from services.core.systems import SYSTEMS
from services.core.types import Reserve, TenantId
from services.scheduler.config import SchedulerSettings
from services.scheduler.journal import CoreRecipe


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALUMMA_SCHEDULER_POLICY", "fifo")
    monkeypatch.setenv("CALUMMA_SCHEDULER_QUEUE_LIMIT", "7")
    settings = load_settings(SchedulerSettings, ["--queue-limit", "9", "--worker-grace-s", "1.5"])
    assert (settings.policy, settings.queue_limit, settings.worker_grace_s) == ("fifo", 9, 1.5)
    assert settings.listen == "127.0.0.1:7101"
    assert settings.recipe().cluster.queue_limit == 9


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--policy", "magic"], "policy: Value error, no 'magic'; the policies are: adaptive, "),
        (["--system", "magic"], "system: Value error, no 'magic'; the systems are: adaptive, "),
        (["--policy-option", "speed=1"], "no option 'speed'; there are: patience, "),
        (["--policy-option", "patience=fast"], "patience=fast: Input should be a valid number"),
        (["--policy-option", "patience=-1"], "patience must be finite and at least zero"),
        (["--policy-option", "decode_share=nan"], "decode_share must be finite and at least zero"),
        (["--policy-option", "passers=-1"], "passers=-1: out of bounds"),
        (["--policy=chameleon", "--policy-option=slo_s=0"], "slo_s must be positive"),
        (["--policy=edf", "--policy-option=default_slo_s=0"], "default_slo_s must be positive"),
        (["--policy=vtc", "--policy-option=output_weight=-2"], "output_weight must be finite and"),
        (["--policy=slo_odbs", "--policy-option=slo_weight=inf"], "slo_weight must be finite and"),
        (
            ["--policy=odbs", "--policy-option=length_weight=0"],
            "slo_weight_plus_length_weight must be positive",
        ),
        (["--policy=static", "--policy-option=cutoffs=5,1"], "cutoffs must rise"),
        (["--tenants=/nonexistent/tenants.toml"], "/nonexistent/tenants.toml: No such file"),
        (["--policy-option", "patience"], "'patience' must be key=value"),
        (["--reserve", "all"], "reserve: Input should be 'max', 'predicted' or 'quantile'"),
        (["--queue-limit", "0"], "queue_limit: "),
        (["--no-such-flag"], "--no-such-flag"),
        (["--listen", "x"], "listen: "),
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_a_line(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(SchedulerSettings, argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, f"{field.name}={value}")
        for name, kind in POLICIES.items()
        for field in dataclasses.fields(kind.config())
        if isinstance(getattr(kind.config(), field.name), float)
        for value in ("nan", "inf", "-1")
    ],
)
def test_no_option_of_any_policy_may_be_nan_infinite_or_negative(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        SchedulerSettings(policy=name, policy_option=dict([option.split("=")]))


def test_a_wrong_option_ends_the_process_with_code_2_and_a_line() -> None:
    command = [sys.executable, "-m", "services.scheduler", "--policy-option", "patience=nan"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "gen"))}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert "patience must be finite and at least zero, not nan" in ended.stderr


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_built_by_its_name(name: str) -> None:
    recipe = SchedulerSettings(system=name).recipe()
    assert recipe.build().snapshot(now=0.0).policy == SYSTEMS[name].policy
    assert recipe.cluster == SYSTEMS[name].cluster


def test_what_is_set_beside_a_system_wins() -> None:
    argv = ["--system=slora", "--reserve=quantile", "--no-dispatches-ahead", "--policy=adaptive"]
    options = ["--policy-option=patience=4", "--policy-option", "passers=3"]
    recipe = load_settings(SchedulerSettings, [*argv, *options]).recipe()
    assert (recipe.policy, recipe.options) == ("adaptive", {"patience": "4", "passers": "3"})
    assert recipe.cluster.reserve is Reserve.QUANTILE
    assert recipe.cluster.dispatches_ahead is False
    assert recipe.cluster.prefetch_depth == SYSTEMS["slora"].cluster.prefetch_depth


def test_tenants_come_from_their_file_and_its_errors_name_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.acme]\nweight = 4.0\nmax_running = 3\n")
    argv = [f"--tenants={file}"]
    recipe = load_settings(SchedulerSettings, argv).recipe()
    assert recipe.cluster.tenants.limits(TenantId("acme")).max_running == 3
    recorded = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert TypeAdapter(CoreRecipe).validate_python(recorded) == recipe
    file.write_text("[tenants.acme]\nweight = -1.0\n")
    with pytest.raises(SystemExit):
        load_settings(SchedulerSettings, argv)
    assert "tenants.acme" in capsys.readouterr().err


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
