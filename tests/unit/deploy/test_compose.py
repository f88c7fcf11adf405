"""`deploy/` names only things that exist: settings, modules, health names, secrets, images."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import ServiceSettings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("gateway", "scheduler", "worker", "adapter_store")


def _settings(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"services.{service}.config")
    name = "".join(part.title() for part in service.split("_")) + "Settings"
    settings: type[ServiceSettings] = getattr(module, name)
    return settings


def _variables(service: str) -> set[str]:
    prefix = f"CALUMMA_{service.upper()}_"
    return {f"{prefix}{field.upper()}" for field in _settings(service).model_fields}


def test_every_calumma_variable_is_a_setting_of_a_service() -> None:
    known = {name for service in OURS for name in _variables(service)}
    known |= {"CALUMMA_ADAPTER_STORE_ADDRESS"}  # of the command line
    used = {
        name
        for service in SERVICES.values()
        for name in service.get("environment", {})
        if name.startswith("CALUMMA_")
    }
    assert used
    assert used <= known


def test_every_secret_is_a_setting_or_read_by_an_image() -> None:
    for secret in COMPOSE["secrets"]:
        if secret.startswith("calumma_"):
            assert secret.upper() in _variables("adapter_store")
        else:
            assert any(f"/run/secrets/{secret}" in str(service) for service in SERVICES.values())


@pytest.mark.parametrize("name", OURS)
def test_each_service_listens_where_its_health_is_asked(name: str) -> None:
    service = SERVICES[name]
    listen = service["environment"][f"CALUMMA_{name.upper()}_LISTEN"]
    _, _, _, module, address, health_name = service["healthcheck"]["test"]
    assert service["command"] == ["python", "-m", f"services.{name}"]
    assert module == "services.common.healthcheck"
    assert address.rpartition(":")[2] == listen.rpartition(":")[2]
    protos = (ROOT / "protos" / "calumma" / name / "v1" / f"{name}.proto").read_text()
    package, _, service_name = health_name.rpartition(".")
    assert f"package {package};" in protos
    assert f"service {service_name} " in protos


def test_the_grace_period_is_longer_than_the_services_own() -> None:
    own_s = ServiceSettings.model_fields["grace_s"].default
    for name in OURS:
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > own_s


def test_dependencies_exist_and_wait_for_health_where_there_is_a_check() -> None:
    for service in SERVICES.values():
        needed = service.get("depends_on", {})
        assert set(needed) <= set(SERVICES)
        if isinstance(needed, dict):
            for other, how in needed.items():
                is_job = SERVICES[other].get("restart") == "no"
                expected = "service_completed_successfully" if is_job else "service_healthy"
                assert how["condition"] == expected
                assert is_job or "healthcheck" in SERVICES[other]


def test_images_are_pinned_and_ports_are_bound_to_loopback() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_containers_of_ours_have_no_privileges() -> None:
    for service in SERVICES.values():
        if service["image"].startswith("calumma/"):
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert "no-new-privileges:true" in service["security_opt"]
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert "USER 10001" in dockerfile


def test_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


def test_the_dashboard_shows_metrics_that_services_export() -> None:
    source = "\n".join(
        path.read_text() for path in (ROOT / "services").rglob("*.py") if "gen" not in path.parts
    )
    exported = {
        name.replace(".", "_")
        for name in re.findall(r'"((?:calumma|gen_ai|rpc)\.[a-z_.]+)"', source)
    }
    shown = set(
        re.findall(
            r"\b((?:calumma|gen_ai|rpc)_[a-z_]+)",
            " ".join(
                target["expr"]
                for panel in yaml.safe_load(
                    (DEPLOY / "grafana" / "dashboards" / "calumma.json").read_text()
                )["panels"]
                for target in panel["targets"]
            ),
        )
    )
    labels = {"calumma_queue", "rpc_method", "rpc_response_status_code"}
    suffixes = r"(_seconds)?(_bucket|_count|_sum|_total)?$"
    assert {re.sub(suffixes, "", name) for name in shown - labels} <= exported


def test_credentials_are_made_once_and_fit_the_s3_configuration(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "secrets" / "create", tmp_path / "create")
    for _ in range(2):
        subprocess.run([tmp_path / "create"], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    identity = yaml.safe_load(made["s3_config.json"])["identities"][0]["credentials"][0]
    assert identity == {
        "accessKey": made["s3_access_key_id"],
        "secretKey": made["s3_secret_access_key"],
    }
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} <= set(made)
