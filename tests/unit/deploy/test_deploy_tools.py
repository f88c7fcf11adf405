"""The tools of each format accept what lies in `deploy/`. Each is asked where it is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[3] / "deploy"


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    beside_python = Path(sys.executable).with_name(tool)
    path = str(beside_python) if beside_python.is_file() else shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    done = _run("hadolint", DEPLOY / "docker" / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_podman_compose_reads_the_compose_file() -> None:
    done = _run("podman-compose", "-f", DEPLOY / "compose.yaml", "config")
    assert done.returncode == 0, done.stderr
    assert "services.gateway" in done.stdout


def test_prometheus_accepts_its_configuration() -> None:
    done = _run("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yaml")
    assert done.returncode == 0, done.stderr


def test_prometheus_can_parse_what_the_dashboard_asks(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "calumma.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions)
    ]
    file = tmp_path / "rules.yaml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = _run("promtool", "check", "rules", file)
    assert done.returncode == 0, done.stderr
