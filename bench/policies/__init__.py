"""Policies compared: knees, times at given loads, regimes, predictors, parts, tenants, faults.

Everything is simulated around the real machines, see `bench.sim`: modelled hardware, no GPU. The
sections are independent; their runs share one pool of processes.
"""

from bench.policies import fleets, knees, loads, parts, predictions, regimes, tenancy
from bench.policies.extent import FULL, QUICK, Extent
from bench.policies.jobs import Section, run_sections
from bench.report import Report


def run(*, quick: bool) -> Report:
    """All sections. Quick ones are for seeing that it works: a minute on two cores."""
    findings = run_sections(sections(QUICK if quick else FULL))
    return Report(
        rows=[row for one in findings for row in one.rows],
        targets=[target for one in findings for target in one.targets],
        figures={name: png for one in findings for name, png in one.figures.items()},
    )


def sections(extent: Extent) -> list[Section]:
    """In the order in which they are reported."""
    return [
        knees.section(extent),
        loads.section(extent),
        regimes.section(extent),
        predictions.section(extent),
        parts.parts(extent),
        parts.sizes(extent),
        tenancy.section(extent),
        fleets.scale(extent),
        fleets.faults(extent),
    ]
