"""The tenants file: read once, refused with the tenant and the field when it cannot be meant."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from services.common.config import load_settings
from services.core.tenants import TenantLimits, Tenants
from services.core.types import TenantId
from services.scheduler.config import SchedulerSettings
from services.scheduler.tenants import TenantsFileError, load_tenants

GOOD = """
[default]
max_queued = 20
tokens_per_s = 100

[tenants.acme]
weight = 4
tokens_per_s = 2000.0
burst_tokens = 20000
max_running = 32
priority = 10

[tenants."team/a:b"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tenants.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_names_the_limits_of_tenants_and_of_all_others(tmp_path: Path) -> None:
    tenants = load_tenants(write(tmp_path, GOOD))
    acme = TenantLimits(4.0, 2000.0, 20_000.0, 32, priority=10)
    assert tenants.limits(TenantId("acme")) == acme
    assert tenants.limits(TenantId("team/a:b")) == TenantLimits()
    assert tenants.limits(TenantId("anybody")) == TenantLimits(tokens_per_s=100, max_queued=20)
    assert tenants.weight(TenantId("acme")) == 4.0


def test_an_empty_file_limits_nobody(tmp_path: Path) -> None:
    tenants = load_tenants(write(tmp_path, ""))
    assert tenants == Tenants()
    assert not tenants.needs_gate


def test_limits_survive_a_recording(tmp_path: Path) -> None:
    adapter = TypeAdapter(Tenants)
    tenants = load_tenants(write(tmp_path, GOOD))
    assert adapter.validate_json(adapter.dump_json(tenants)) == tenants


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tenants.acme]\nweight = -1", r"tenants\.acme\.weight: must be"),
        ("[tenants.acme]\nweight = 0", r"tenants\.acme\.weight: must be"),
        ("[tenants.acme]\nweight = nan", r"tenants\.acme\.weight: must be"),
        ("[tenants.acme]\ntokens_per_s = inf", r"tenants\.acme\.tokens_per_s: must be"),
        ("[tenants.acme]\nburst_tokens = 5", r"tenants\.acme\.burst_tokens: needs tokens_per_s"),
        ("[tenants.acme]\nmax_running = 1.5", r"tenants\.acme\.max_running: .*integer"),
        ("[tenants.acme]\nmax_running = true", r"tenants\.acme\.max_running: .*integer"),
        ('[tenants.acme]\nweight = "2"', r"tenants\.acme\.weight: .*number"),
        ("[tenants.acme]\nwieght = 2", r"tenants\.acme\.wieght: Extra inputs"),
        ("[default]\nmax_queued = -1", r"default\.max_queued: must be"),
        ("[tenants]\nacme = 3", r"tenants\.acme: "),
        ('[tenants."a b"]', r"tenants\.a b \(name\): "),
        ("[tenant.acme]", r"tenant: Extra inputs"),
        ("[tenants.acme", r"is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_tenant_and_field(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(TenantsFileError, match=said):
        load_tenants(write(tmp_path, text))


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[tenants.a]\nx = 1\n[tenants.b]\ny = 1")
    with pytest.raises(TenantsFileError, match=r"tenants\.a\.x(.|\n)*tenants\.b\.y"):
        load_tenants(path)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TenantsFileError, match="No such file"):
        load_tenants(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TenantsFileError, match="is not TOML"):
        load_tenants(tmp_path / "binary.toml")


def test_the_file_is_named_by_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_settings(SchedulerSettings, ["--tenants", str(path)]).tenants == path
    assert load_settings(SchedulerSettings, []).tenants is None
