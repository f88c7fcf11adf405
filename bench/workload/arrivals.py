"""When requests arrive: random processes of a given mean rate, or recorded times at that rate.

A process draws unit-mean gaps and divides them by the rate, so that one seed gives the same
sequence at every rate, only faster: two loads differ by the load alone.
"""

from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from bench.workload.public_data import read_arrivals

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals."""

    rate_rps: float


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps with a coefficient of variation: 1 is Poisson, above it bursty."""

    rate_rps: float
    cv: float


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson at `burst` times the mean rate for `on_s` of every `period_s`, slower in the rest."""

    rate_rps: float
    burst: float = 2.0
    on_s: float = 30.0
    period_s: float = 120.0

    def __post_init__(self) -> None:
        assert 0 < self.on_s < self.period_s
        assert 1 <= self.burst <= self.period_s / self.on_s


@dataclass(frozen=True, slots=True)
class FromTrace:
    """Recorded arrival times of "azure-conv" or "azure-code", rescaled; repeated when too short."""

    rate_rps: float
    recorded: str = "azure-conv"


Arrivals = Poisson | Gamma | OnOff | FromTrace


def arrival_times_s(arrivals: Arrivals, duration_s: float, rng: np.random.Generator) -> Floats:
    """Arrival times in [0, duration), ascending."""
    assert arrivals.rate_rps > 0
    match arrivals:
        case Poisson(rate_rps):
            times_s = _renewals(rate_rps, duration_s, rng, cv=1.0)
        case Gamma(rate_rps, cv):
            times_s = _renewals(rate_rps, duration_s, rng, cv=cv)
        case OnOff():
            times_s = _on_off(arrivals, duration_s, rng)
        case FromTrace(rate_rps, recorded):
            unit = _recorded_units(recorded, rng)
            repeats = int(duration_s * rate_rps // len(unit)) + 1
            times_s = np.concatenate([unit + k * len(unit) for k in range(repeats)]) / rate_rps
        case _:
            assert_never(arrivals)
    return times_s[times_s < duration_s]


def _renewals(rate_rps: float, duration_s: float, rng: np.random.Generator, *, cv: float) -> Floats:
    shape = 1.0 / (cv * cv)
    units: list[Floats] = [np.zeros(1)]
    while units[-1][-1] < duration_s * rate_rps:
        gaps = rng.gamma(shape, 1.0 / shape, size=1024)
        units.append(units[-1][-1] + np.cumsum(gaps))
    return np.concatenate(units[1:]) / rate_rps


def _on_off(arrivals: OnOff, duration_s: float, rng: np.random.Generator) -> Floats:
    """A Poisson process of mean 1 in operational time, mapped to time by the inverse rate."""
    share = arrivals.on_s / arrivals.period_s
    slow = (1.0 - arrivals.burst * share) / (1.0 - share)
    steps = np.tile(
        [arrivals.on_s, arrivals.period_s - arrivals.on_s], 1 + int(duration_s // arrivals.period_s)
    )
    edges_s = np.concatenate([[0.0], np.cumsum(steps)])
    work = steps * np.tile([arrivals.burst, slow], len(steps) // 2) * arrivals.rate_rps
    edges = np.concatenate([[0.0], np.cumsum(work)])
    units = _renewals(1.0, float(edges[-1]), rng, cv=1.0)
    return np.asarray(np.interp(units[units < edges[-1]], edges, edges_s), dtype=np.float64)


def _recorded_units(recorded: str, rng: np.random.Generator) -> Floats:
    """Arrival times at mean rate 1. Without the data: gamma gaps of its published variation."""
    times_s = read_arrivals(recorded)
    if times_s is None:
        cv = {"azure-conv": 1.09, "azure-code": 13.0}[recorded]
        return _renewals(1.0, 10_000.0, rng, cv=cv)
    scale = len(times_s) / float(times_s[-1] - times_s[0])
    return np.asarray((times_s - times_s[0]) * scale, dtype=np.float64)
