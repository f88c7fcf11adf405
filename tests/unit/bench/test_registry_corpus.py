"""The adapters that `bench registry` writes are what a real registry reads."""

from pathlib import Path

from bench.registry.corpus import PERCENT, adapter_name, write_adapters
from services.adapter_store.entries import Weights
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry
from services.adapter_store.storage import Timeouts, open_storage

SHARED = Weights("sha256:" + "1" * 64, 8, 1000, ("q_proj",), "BF16", "org/base", 512)


async def test_a_registry_reads_every_adapter_with_its_versions_alias_and_canary(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "store"
    written_bytes = write_adapters(folder, 50, SHARED)
    assert written_bytes == sum(file.stat().st_size for file in folder.rglob("*.json"))
    registry = Registry(open_storage(folder.as_uri(), Timeouts(5.0, 5.0)))
    await registry.sync()
    entries = list(registry.page(after=""))
    assert {entry.name for entry in entries} == {adapter_name(number) for number in range(50)}
    for entry in entries:
        assert entry.canaries["prod"].percent == PERCENT
        version, _ = await registry.get(parse_reference(f"{entry.name}@prod"))
        assert (version.number, version.weights) == (1, SHARED)
