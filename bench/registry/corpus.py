"""Many adapters in an object store: each a document of the registry's own, all with one blob."""

import time
import uuid
from pathlib import Path
from typing import Final

from services.adapter_store.documents import to_json
from services.adapter_store.entries import Canary, Entry, Version, Weights
from services.adapter_store.registry import document_path

_AGE_NS: Final = 24 * 3600 * 10**9  # since they were published
PERCENT: Final = 10  # of each alias's canary


def adapter_name(number: int) -> str:
    """Names that do not come in the order in which they were made."""
    return f"{number * 2_654_435_761 % 2**32:08x}-adapter-{number}"


def write_adapters(store: Path, count: int, shared: Weights) -> int:
    """Write `count` adapters of two versions, with an alias and its canary. Returns the bytes."""
    changed_ns = time.time_ns() - _AGE_NS
    other = _other(shared)
    written_bytes = 0
    for number in range(count):
        entry = Entry(
            name=adapter_name(number),
            revision=1,
            versions=(Version(1, changed_ns, shared), Version(2, changed_ns, other)),
            aliases={"prod": 1},
            next_version=3,
            change_id=uuid.uuid4().hex,
            changed_ns=changed_ns,
            canaries={"prod": Canary(2, PERCENT)},
        )
        path = store / document_path(entry.name, entry.revision)
        path.parent.mkdir(parents=True)
        written_bytes += path.write_bytes(to_json(entry))
    return written_bytes


def _other(shared: Weights) -> Weights:
    """A digest that no blob has: nobody downloads the second versions."""
    return Weights(
        digest="sha256:" + "0" * 64,
        rank=shared.rank,
        size_bytes=shared.size_bytes,
        target_modules=shared.target_modules,
        dtype=shared.dtype,
        base_model=shared.base_model,
        parameters=shared.parameters,
    )
