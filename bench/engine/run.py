"""The whole comparison: two models, our two tiers, and the peers.

The time it may take is bounded: each part ends after its share, with fewer alternations than it
wanted if the machine is slow, and the rows say how many there were.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from bench.engine import models, tables
from bench.engine.bandwidth import ReadBandwidth
from bench.engine.measures import OUTPUT_TOKENS, Sample
from bench.engine.models import Subject
from bench.engine.systems import TIERS, System, llama_cpp, ours, peft, vllm, vllm_lora
from bench.engine.turns import Running
from bench.engine.unused import Unused, adapters_unused
from bench.peers.lines import PeerError
from bench.report import Report
from services.common.base_model import ModelNotFoundError

_SMALL_MEASURES: Final = (tables.BASE_1, tables.BASE_8, tables.BASE_32, tables.MIXED_32)
_SMOL_MEASURES: Final = (tables.BASE_1, tables.BASE_8, tables.MIXED_8)


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much of everything. `small_s` and so on: seconds from the start in which a part begins
    its last alternation.
    """

    alternations: int
    output_tokens: int
    unused_pairs: int
    small: Sequence[System]
    smol: Sequence[System]
    small_s: float
    smol_s: float
    left_out: Sequence[str] = ()  # systems that a quick run has no time for


@dataclass(slots=True)
class _Found:
    samples: list[Sample] = field(default_factory=list[Sample])
    unused: dict[str, Unused] = field(default_factory=dict[str, Unused])
    absent: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])


def run(*, quick: bool) -> Report:
    """Compare. Peers that are not installed are left out, and the report says so."""
    extent = _quick() if quick else _full()
    began_s = time.monotonic()
    found = _Found(absent=[("both", name, "a quick run") for name in extent.left_out])
    small = models.small()
    bandwidth = ReadBandwidth()
    try:
        _compare(found, small, extent, bandwidth, end_s=began_s + extent.small_s)
        smol = _smol(found)
        if smol is not None:
            _compare(found, smol, extent, bandwidth, end_s=began_s + extent.smol_s)
    finally:
        bandwidth.close()
    return _report(found, smol, peers={system.name for system in extent.small})


def _full() -> _Extent:
    tiers = [ours(tier) for tier in TIERS]
    return _Extent(
        alternations=5,
        output_tokens=OUTPUT_TOKENS,
        unused_pairs=12,
        small=[
            *tiers,
            llama_cpp(),
            vllm(),
            peft(base_too=False),
            vllm_lora(base_too=False, alternations_max=5),
        ],
        smol=[
            *tiers,
            llama_cpp(),
            peft(base_too=True),
            vllm_lora(base_too=True, alternations_max=2),
        ],
        small_s=330.0,
        smol_s=480.0,
    )


def _quick() -> _Extent:
    tiers = [ours(tier) for tier in TIERS]
    return _Extent(
        alternations=1,
        output_tokens=10,
        unused_pairs=1,
        small=[*tiers, llama_cpp(), peft(base_too=False)],
        smol=tiers,
        small_s=30.0,
        smol_s=45.0,
        left_out=["vllm", "vllm_lora"],
    )


def _smol(found: _Found) -> Subject | None:
    try:
        return models.smol()
    except ModelNotFoundError as error:
        found.absent.append(("smol", "every system", str(error)))
        return None


def _compare(
    found: _Found, subject: Subject, extent: _Extent, bandwidth: ReadBandwidth, *, end_s: float
) -> None:
    is_small = subject.name == "small"
    measures = _SMALL_MEASURES if is_small else _SMOL_MEASURES
    running = Running(subject, extent.small if is_small else extent.smol)
    with ExitStack() as stack:
        running.start(stack)
        running.warm_up(measures)
        running.alternate(
            measures,
            bandwidth,
            alternations=extent.alternations,
            output_tokens=extent.output_tokens,
            end_s=end_s,
        )
        if is_small:
            _measure_unused(found, running, extent)
    found.samples += running.samples
    found.absent += [(subject.name, system, why) for system, why in running.absent.items()]


def _measure_unused(found: _Found, running: Running, extent: _Extent) -> None:
    for tier in TIERS:
        child = running.children.get(tier)
        if child is None:
            continue
        try:
            found.unused[tier] = adapters_unused(
                child,
                running.subject,
                pairs=extent.unused_pairs,
                output_tokens=extent.output_tokens // 2,
            )
        except PeerError as error:
            running.absent[f"{tier}, adapters unused"] = str(error)


def _report(found: _Found, smol: Subject | None, *, peers: Collection[str]) -> Report:
    """`peers`: those that the small model's measures were meant for."""
    rows = [
        *tables.alternation_rows(found.samples),
        *tables.system_rows(found.samples),
        *(tables.retention_rows(found.samples, smol) if smol else []),
        *tables.unused_rows(found.unused),
        *tables.absent_rows(found.absent),
    ]
    targets = [
        *tables.peer_targets(found.samples, peers),
        *(tables.large_model_targets(found.samples, smol) if smol else []),
        *tables.unused_targets(found.unused),
    ]
    return Report(rows, targets)
