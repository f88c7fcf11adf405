"""What goes wrong, and when. Workers are counted from 0."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerLoss:
    """The process dies; another one takes its place at `back_s`, cold, or none does."""

    worker: int
    at_s: float
    back_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerSlow:
    """Its steps take `factor` times as long while it lasts."""

    worker: int
    from_s: float
    until_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class StoreSlow:
    """Downloads that begin while it lasts take `factor` times as long."""

    from_s: float
    until_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class StoreDown:
    """Downloads that begin while it lasts fail."""

    from_s: float
    until_s: float


Fault = WorkerLoss | WorkerSlow | StoreSlow | StoreDown


def slowness(faults: Iterable[Fault], worker: int, now: float) -> float:
    """How many times as long a step takes."""
    factor = 1.0
    for fault in faults:
        if isinstance(fault, WorkerSlow) and fault.worker == worker:
            factor *= fault.factor if fault.from_s <= now < fault.until_s else 1.0
    return factor


def store_slowness(faults: Iterable[Fault], now: float) -> float | None:
    """How many times as long a download takes; None while the store is down."""
    factor = 1.0
    for fault in faults:
        if isinstance(fault, StoreDown) and fault.from_s <= now < fault.until_s:
            return None
        if isinstance(fault, StoreSlow) and fault.from_s <= now < fault.until_s:
            factor *= fault.factor
    return factor
