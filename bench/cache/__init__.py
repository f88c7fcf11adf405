"""The adapter cache: eviction policies against each other and against those that can foresee.

Two levels: the cache alone, on sequences of uses in many regimes (`pure`), and the whole worker
simulated where memory is scarce (`served`). A third part times loads that overlap with the
computation of the prompts that wait for them (`overlap`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.cache import overlap, pure, served
from bench.policies.jobs import Section, run_sections
from bench.report import Report


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is run. Quick runs are too short and too few to claim anything by."""

    seeds: tuple[int, ...]
    requests: int  # of each replay
    served_s: float


FULL: Final = Extent(seeds=(0, 1, 2), requests=7200, served_s=900.0)
QUICK: Final = Extent(seeds=(0,), requests=3000, served_s=120.0)


def run(*, quick: bool) -> Report:
    """All sections."""
    findings = run_sections(sections(QUICK if quick else FULL))
    return Report(
        rows=[row for one in findings for row in one.rows],
        targets=[target for one in findings for target in one.targets],
        figures={name: png for one in findings for name, png in one.figures.items()},
    )


def sections(extent: Extent) -> Sequence[Section]:
    """In the order in which they are reported."""
    return [
        pure.section(requests=extent.requests, seeds=extent.seeds),
        served.section(duration_s=extent.served_s, seeds=extent.seeds),
        overlap.section(duration_s=extent.served_s, seeds=extent.seeds),
    ]
