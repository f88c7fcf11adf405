"""`calumma adapters …` against an adapter store that speaks the proto."""

import json
from functools import partial
from pathlib import Path

import pytest

from calumma.adapter_store.v1 import adapter_store_pb2_grpc
from tests.unit.cli.conftest import Run, last_json
from tests.unit.cli.fake_services import DIGEST, STORE, FakeScheduler, FakeStore, served

VERSION_FIELDS = {
    "name",
    "version",
    "digest",
    "rank",
    "size_bytes",
    "dtype",
    "target_modules",
    "parameters",
    "base_model",
    "created",
    "labels",
    "provenance",
}
ADAPTER_FIELDS = {
    "name",
    "revision",
    "aliases",
    "versions",
    "canaries",
    "previous_versions",
    "tenants",
    "pins",
    "changed",
}
NOWHERE = "127.0.0.1:1"  # nothing listens there


def test_publish_uploads_both_files_in_chunks_and_reports_the_bindings(
    run: Run, store: FakeStore, store_address: str, peft_folder: Path
) -> None:
    options = ["--name", "billing", "--alias", "prod", "--alias", "beta"]
    result = run(
        ["--adapter-store", store_address, "adapters", "publish", str(peft_folder), *options]
    )
    assert result.exit_code == 0, result.output
    assert "billing@1 is published" in result.stdout
    assert "q_proj" in result.stdout
    assert store.uploads["billing"] == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(2**20),
    }
    assert list(store.metadata[0].aliases) == ["prod", "beta"]


def test_publishing_the_same_weights_again_is_recognised(
    run: Run, store_address: str, peft_folder: Path
) -> None:
    arguments = ["adapters", "publish", str(peft_folder), "--name", "billing"]
    run(["--adapter-store", store_address, *arguments])
    result = run(["--adapter-store", store_address, *arguments])
    assert result.exit_code == 0
    assert "has these weights already" in result.stdout


def test_a_dry_run_publishes_nothing(
    run: Run, store: FakeStore, store_address: str, peft_folder: Path
) -> None:
    arguments = ["adapters", "publish", str(peft_folder), "--name", "billing", "--dry-run"]
    result = run(["--adapter-store", store_address, *arguments])
    assert result.exit_code == 0
    assert "billing can be published" in result.stdout
    assert store.uploads == {}


def test_publish_as_json_has_documented_fields(
    run: Run, store_address: str, peft_folder: Path
) -> None:
    arguments = ["adapters", "publish", str(peft_folder), "--name", "billing", "--json"]
    published = last_json(run(["--adapter-store", store_address, *arguments]))
    assert set(published) == {"dry_run", "already_published", "version", "bindings"}
    assert set(published["version"]) == VERSION_FIELDS
    assert published["version"]["created"] == "2023-11-14T22:13:20+00:00"
    assert published["bindings"][0] == {
        "module": "model.layers.0.self_attn.q_proj",
        "rank": 16,
        "scale": 2.0,
    }


def test_a_refused_adapter_ends_with_1_and_says_why(
    run: Run, store_address: str, peft_folder: Path
) -> None:
    (peft_folder / "adapter_config.json").write_text("bad")
    arguments = ["adapters", "publish", str(peft_folder), "--name", "billing"]
    result = run(["--adapter-store", store_address, *arguments])
    assert result.exit_code == 1
    assert "trained on another model" in result.stderr
    assert "ADAPTER_BASE_MISMATCH" in result.stderr


def test_a_folder_without_weights_is_refused_before_any_call(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    result = run(["adapters", "publish", str(tmp_path), "--name", "billing"])
    assert result.exit_code == 1
    assert "has no adapter_model.safetensors" in result.stderr


def test_a_folder_that_is_not_there_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    result = run(["adapters", "publish", str(tmp_path / "nowhere"), "--name", "billing"])
    assert result.exit_code == 2


def test_list_reads_every_page(run: Run, store_address: str) -> None:
    result = run(["--adapter-store", store_address, "adapters", "list", "--json"])
    adapters = last_json(result)["adapters"]
    assert [adapter["name"] for adapter in adapters] == ["alpha", "beta", "gamma"]
    assert set(adapters[0]) == ADAPTER_FIELDS
    assert set(adapters[0]["versions"][0]) == VERSION_FIELDS


def test_list_can_be_narrowed_and_is_a_table_for_people(run: Run, store_address: str) -> None:
    result = run(["--adapter-store", store_address, "adapters", "list", "--prefix", "be"])
    assert result.exit_code == 0
    assert "beta" in result.stdout
    assert "prod→1" in result.stdout
    assert "alpha" not in result.stdout


def test_show_marks_the_resolved_version(run: Run, store_address: str) -> None:
    person = run(["--adapter-store", store_address, "adapters", "show", "beta@prod"])
    assert "revision 2" in person.stdout
    assert DIGEST[:19] in person.stdout
    script = last_json(
        run(["--adapter-store", store_address, "adapters", "show", "beta", "--json"])
    )
    assert (script["resolved_version"], script["name"]) == (1, "beta")


def test_an_alias_is_set_and_removed(run: Run, store: FakeStore, store_address: str) -> None:
    base = ["--adapter-store", store_address, "adapters"]
    assert run([*base, "alias", "beta", "canary", "1"]).exit_code == 0
    assert dict(store.adapters["beta"].aliases) == {"prod": 1, "canary": 1}
    removed = run([*base, "unalias", "beta", "prod", "--json"])
    assert json.loads(removed.stdout)["aliases"] == {"canary": 1}
    missing = run([*base, "unalias", "beta", "prod"])
    assert missing.exit_code == 1
    assert "ALIAS_NOT_FOUND" in missing.stderr


def test_publish_sends_all_that_is_said_of_a_version(
    run: Run, store: FakeStore, store_address: str, peft_folder: Path
) -> None:
    said = ["--version", "3", "--label", "team=x", "--label", "run=a=b", "--source", "run 7"]
    said += ["--tenant", "acme", "--tenant", "beta", "--publisher", "acme"]
    base = ["--adapter-store", store_address, "adapters", "publish", str(peft_folder)]
    result = run([*base, "--name", "billing", *said])
    assert result.exit_code == 0, result.output
    metadata = store.metadata[0]
    assert (metadata.version, metadata.source, metadata.tenant) == (3, "run 7", "acme")
    assert dict(metadata.labels) == {"team": "x", "run": "a=b"}
    assert list(metadata.tenants) == ["acme", "beta"]


@pytest.mark.parametrize("labels", [["team"], ["=x"], ["team=x", "team=y"]])
def test_a_label_that_is_none_is_wrong_usage(
    run: Run, store: FakeStore, store_address: str, peft_folder: Path, labels: list[str]
) -> None:
    options = [part for label in labels for part in ("--label", label)]
    base = ["--adapter-store", store_address, "adapters", "publish", str(peft_folder)]
    assert run([*base, "--name", "billing", *options]).exit_code == 2
    assert not store.metadata


def test_a_dry_run_shows_how_modules_were_bound(
    run: Run, store_address: str, peft_folder: Path
) -> None:
    base = ["--adapter-store", store_address, "adapters", "publish", str(peft_folder)]
    result = run([*base, "--name", "billing", "--dry-run"])
    (row,) = [line.split() for line in result.stdout.splitlines() if "q_proj" in line]
    assert row == ["q_proj", "3", "6", "16", "2"]


def test_a_list_is_asked_for_what_is_wanted(run: Run, store: FakeStore, store_address: str) -> None:
    filters = ["--label", "team=x", "--base-model", "org/base", "--tenant", "acme"]
    base = ["--adapter-store", store_address, "adapters", "list"]
    assert run([*base, *filters, "--digest", DIGEST]).exit_code == 0
    asked = store.lists[0]
    assert dict(asked.labels) == {"team": "x"}
    assert (asked.base_model, asked.tenant, asked.digest) == ("org/base", "acme", DIGEST)
    assert all(request.labels == asked.labels for request in store.lists[1:])


def test_a_canary_begins_and_is_rolled_back(run: Run, store: FakeStore, store_address: str) -> None:
    base = ["--adapter-store", store_address, "adapters"]
    begun = run([*base, "alias", "beta", "prod", "2", "--canary", "5"])
    assert "version 2 for 5 % of its requests" in begun.stdout
    assert "prod→1 (5 % →2)" in run([*base, "list"]).stdout
    shown = last_json(run([*base, "show", "beta", "--json"]))
    assert shown["canaries"] == {"prod": {"version": 2, "percent": 5}}
    assert "version 1 for all" in run([*base, "rollback", "beta", "prod"]).stdout
    assert not store.adapters["beta"].canaries
    again = run([*base, "rollback", "beta", "prod", "--json"])
    assert again.exit_code == 1
    assert last_json(again)["error"]["reason"] == "ALIAS_HAS_NO_PREVIOUS"


@pytest.mark.parametrize("percent", ["0", "100", "-1"])
def test_a_canary_has_a_share_and_leaves_one(run: Run, store_address: str, percent: str) -> None:
    base = ["--adapter-store", store_address, "adapters", "alias", "beta", "prod", "1"]
    assert run([*base, "--canary", percent]).exit_code == 2


def test_visibility_needs_tenants_or_all(run: Run, store: FakeStore, store_address: str) -> None:
    base = ["--adapter-store", store_address, "adapters", "visibility", "beta"]
    assert run(base).exit_code == 2
    assert run([*base, "--tenant", "acme", "--all"]).exit_code == 2
    assert "for acme" in run([*base, "--tenant", "acme"]).stdout
    assert list(store.adapters["beta"].tenants) == ["acme"]
    assert last_json(run([*base, "--all", "--json"]))["tenants"] == []


def test_a_pin_says_why_and_is_removed(run: Run, store: FakeStore, store_address: str) -> None:
    base = ["--adapter-store", store_address, "adapters"]
    assert run([*base, "pin", "beta@prod"]).exit_code == 2
    assert run([*base, "pin", "beta@prod", "--reason", "demo day"]).exit_code == 0
    assert "demo day" in run([*base, "show", "beta"]).stdout
    pins = last_json(run([*base, "show", "beta", "--json"]))["pins"]
    assert pins == [
        {"selector": "prod", "reason": "demo day", "created": "2023-11-14T22:13:20+00:00"}
    ]
    assert run([*base, "unpin", "beta@prod"]).exit_code == 0
    assert run([*base, "unpin", "beta@prod"]).exit_code == 1
    assert not store.adapters["beta"].pins


# Deleting


def test_delete_needs_a_yes_where_nobody_can_be_asked(
    run: Run, store: FakeStore, store_address: str
) -> None:
    base = ["--adapter-store", store_address, "adapters", "delete", "beta"]
    assert run(base).exit_code == 2
    assert "beta" in store.adapters
    assert run([*base, "--yes"]).exit_code == 0
    assert "beta" not in store.adapters


def test_what_is_deleted_is_taken_from_workers(
    run: Run, scheduler: FakeScheduler, store_address: str, scheduler_address: str
) -> None:
    addresses = ["--adapter-store", store_address, "--scheduler", scheduler_address]
    base = [*addresses, "adapters", "delete", "--yes"]
    first = run([*base, "alpha"])  # others still have its weights
    assert first.exit_code == 0, first.output
    assert not scheduler.unloads
    run([*base, "beta"])
    result = last_json(run([*base, "gamma", "--grace", "2.5", "--json"]))
    assert result == {
        "deleted": "gamma",
        "digests": [DIGEST],
        "unload": {
            "freed_bytes": 3_500_000,
            "unloaded_workers": ["w-1"],
            "holding_workers": [],
            "failure": None,
        },
    }
    (asked,) = scheduler.unloads
    assert asked.digest == DIGEST
    assert asked.grace.ToMilliseconds() == 2500


def test_a_delete_prints_what_it_freed(run: Run, scheduler_address: str) -> None:
    register = partial(
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server, FakeStore("only")
    )
    with served(STORE, register) as address:
        addresses = ["--adapter-store", address, "--scheduler", scheduler_address]
        result = run([*addresses, "adapters", "delete", "only", "--yes"])
    assert "3.3 MiB freed at 1 worker" in result.stdout


def test_no_drain_leaves_workers_alone(
    run: Run, scheduler: FakeScheduler, scheduler_address: str
) -> None:
    register = partial(
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server, FakeStore("only")
    )
    with served(STORE, register) as address:
        addresses = ["--adapter-store", address, "--scheduler", scheduler_address]
        result = run([*addresses, "adapters", "delete", "only", "--yes", "--no-drain"])
    assert result.exit_code == 0
    assert not scheduler.unloads


def test_a_delete_is_done_when_no_scheduler_answers(run: Run) -> None:
    store = FakeStore("only")
    register = partial(adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server, store)
    with served(STORE, register) as address:
        addresses = ["--adapter-store", address, "--scheduler", NOWHERE]
        result = run([*addresses, "adapters", "delete", "only", "--yes", "--json"])
    assert result.exit_code == 0
    assert store.adapters == {}
    assert "does not answer" in last_json(result)["unload"]["failure"]
    assert "not taken from workers" in result.stderr


def test_unload_frees_what_stays_published(
    run: Run,
    store: FakeStore,
    scheduler: FakeScheduler,
    store_address: str,
    scheduler_address: str,
) -> None:
    addresses = ["--adapter-store", store_address, "--scheduler", scheduler_address]
    for what in ("beta@prod", DIGEST):
        result = last_json(run([*addresses, "adapters", "unload", what, "--json"]))
        assert (result["freed_bytes"], result["unloaded_workers"]) == (3_500_000, ["w-1"])
    assert [request.digest for request in scheduler.unloads] == [DIGEST, DIGEST]
    assert "beta" in store.adapters


def test_an_unload_that_requests_hold_up_fails(
    run: Run, scheduler: FakeScheduler, store_address: str, scheduler_address: str
) -> None:
    scheduler.holding = ("w-2",)
    addresses = ["--adapter-store", store_address, "--scheduler", scheduler_address]
    result = run([*addresses, "adapters", "unload", "beta", "--grace", "0"])
    assert result.exit_code == 1
    assert "still held by w-2" in result.stderr


def test_an_unload_needs_the_scheduler(run: Run, store_address: str) -> None:
    addresses = ["--adapter-store", store_address, "--scheduler", NOWHERE]
    result = run([*addresses, "adapters", "unload", "beta", "--json"])
    assert result.exit_code == 1
    assert last_json(result)["error"]["code"] == "UNAVAILABLE"
