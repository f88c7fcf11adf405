"""How much is run: everything, or enough of everything to see that it works."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Extent:
    """Seeds and virtual seconds. Quick runs are too short and too few to claim anything by."""

    seeds: tuple[int, ...]
    knee_s: float  # of a run of the main calibration's knees
    side_knee_s: float  # of the other calibrations and policies
    side_tolerance_rps: float
    has_sides: bool  # other calibrations, other policies
    loads_rps: tuple[float, ...]
    load_s: float
    regime_loads_rps: tuple[float, ...]
    regime_s: float
    part_s: float
    tenant_s: float
    scale_s: float  # with 64 workers; a third of it with 256
    fault_s: float


FULL: Final = Extent(
    seeds=(0, 1, 2),
    knee_s=900.0,
    side_knee_s=600.0,
    side_tolerance_rps=0.2,
    has_sides=True,
    loads_rps=(6.0, 8.0, 9.0, 9.5, 12.0),
    load_s=900.0,
    regime_loads_rps=(6.0, 8.0, 9.0, 9.5, 12.0),
    regime_s=400.0,
    part_s=450.0,
    tenant_s=300.0,
    scale_s=30.0,
    fault_s=200.0,
)
QUICK: Final = Extent(
    seeds=(0,),
    knee_s=150.0,
    side_knee_s=100.0,
    side_tolerance_rps=0.5,
    has_sides=False,
    loads_rps=(6.0, 9.0),
    load_s=200.0,
    regime_loads_rps=(8.0,),
    regime_s=100.0,
    part_s=100.0,
    tenant_s=60.0,
    scale_s=6.0,
    fault_s=60.0,
)
