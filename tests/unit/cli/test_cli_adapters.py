"""`calumma adapters …` against an adapter store that speaks the proto."""

import json
from pathlib import Path

from tests.unit.cli.conftest import Run, last_json
from tests.unit.cli.fake_services import DIGEST, FakeStore

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
}


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
    assert set(adapters[0]) == {"name", "revision", "aliases", "versions"}
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


def test_delete_needs_a_yes_where_nobody_can_be_asked(
    run: Run, store: FakeStore, store_address: str
) -> None:
    base = ["--adapter-store", store_address, "adapters", "delete", "beta"]
    assert run(base).exit_code == 2
    assert "beta" in store.adapters
    assert last_json(run([*base, "--yes", "--json"])) == {"deleted": "beta"}
    assert "beta" not in store.adapters
