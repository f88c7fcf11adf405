"""`deploy/` names only things that exist: settings, modules, health names, secrets, images."""

import importlib
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import ServiceSettings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
SETTINGS_HOME = "CALUMMA_HOME=/var/lib/calumma/cache"
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
    known |= {f"CALUMMA_{service.upper()}_ADDRESS" for service in OURS}  # of the command line
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
    assert f"python -m services.{name}" in " ".join(service["command"])
    assert module == "services.common.healthcheck"
    assert address.rpartition(":")[2] == listen.rpartition(":")[2]
    protos = (ROOT / "protos" / "calumma" / name / "v1" / f"{name}.proto").read_text()
    package, _, service_name = health_name.rpartition(".")
    assert f"package {package};" in protos
    assert f"service {service_name} " in protos


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_every_worker_replica_is_dialled_by_its_own_name(name: str) -> None:
    service = SERVICES[name]
    port = service["environment"]["CALUMMA_WORKER_LISTEN"].rpartition(":")[2]
    assert f'--advertise "$$(hostname):{port}"' in service["command"][-1]
    assert "advertise" in _settings("worker").model_fields
    assert "CALUMMA_WORKER_ADVERTISE" not in service["environment"]


def test_jobs_can_be_interrupted_though_they_are_process_1() -> None:
    jobs = [service for service in SERVICES.values() if service["restart"] == "no"]
    assert len(jobs) == 3
    assert all(job["init"] for job in jobs)


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
    assert "USER 10001" in DOCKERFILE


def test_folders_that_services_write_to_belong_to_their_user_in_the_image() -> None:
    for service in SERVICES.values():
        if service["image"].startswith("calumma/"):
            for volume in service.get("volumes", []):
                folder = volume.removesuffix(":ro").rpartition(":")[2]
                if not volume.endswith(":ro"):
                    assert re.search(rf"mkdir -p [^&]*{folder}\b", DOCKERFILE), folder
    assert SETTINGS_HOME in DOCKERFILE


def test_what_the_images_copy_and_install_exists() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY ([^-].*)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r'"\.\[(.*)\]"', DOCKERFILE):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for service in SERVICES.values():
        if service["image"].startswith("calumma/"):
            assert service["image"].endswith(f":{project['version']}")
            assert f" AS {service['build']['target']}\n" in DOCKERFILE
            assert all(f"ARG {name}=" in DOCKERFILE for name in service["build"].get("args", {}))


def test_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


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
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    # Readable for other user ids once they are mounted into a container.
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) & 0o044 for name in made)
    assert (DEPLOY / "secrets" / ".gitignore").read_text().split() == [
        "*",
        "!.gitignore",
        "!create",
    ]
