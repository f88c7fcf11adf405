"""The loads that systems bear: the headline of the report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.fluid import fluid_bound_rps
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import CALIBRATIONS, MAIN, World
from bench.report import Row, Target
from bench.sim import Knee, knees
from services.core.systems import SYSTEMS

NAME: Final = "knees"
CHEAPER: Final = 3.5  # our kernels' cost against the fitted ones: modelled, no GPU was at hand
_MAIN_SYSTEMS: Final = ("slora", "slora-strong", "chameleon", "chameleon-paced", "adaptive")
_SIDE_SYSTEMS: Final = ("slora", "slora-strong", "chameleon", "adaptive")
_ORDERS: Final = ("fifo", "sjf", "aged_sjf", "static", "edf")
_CHEAPER_SYSTEMS: Final = ("slora", "adaptive")
_LOW_RPS, _HIGH_RPS = 1.0, 24.0
_RUNS_PER_SEED: Final = 8  # of a search, about
# Of the joint knee over its fluid bound: where a search begins, which only saves runs.
_GUESSES: Final = {"slora": 0.74, "slora-strong": 0.72, "chameleon": 0.47, "chameleon-paced": 0.72}
_GUESS: Final = 0.89


@dataclass(frozen=True, slots=True)
class FindKnee:
    """A job: both knees of one system, over all seeds."""

    world: World
    system: str
    seeds: tuple[int, ...]
    tolerance_rps: float
    guess_rps: float

    @property
    def cost_s(self) -> float:
        requests = self.guess_rps * self.world.workload.duration_s
        return _RUNS_PER_SEED * len(self.seeds) * requests / 3000

    def run(self) -> Knee:
        system = SYSTEMS[self.system]
        return knees(
            lambda rate_rps, seed: self.world.scenario(system, rate_rps, seed),
            seeds=self.seeds,
            low_rps=_LOW_RPS,
            high_rps=_HIGH_RPS,
            tolerance_rps=self.tolerance_rps,
            guess_rps=self.guess_rps,
        )


def section(extent: Extent) -> Section:
    """All searches."""
    cheaper = replace(
        MAIN,
        name=f"main, LoRA kernels {CHEAPER}x cheaper (modelled)",
        hardware=MAIN.hardware.with_lora_scale(1 / CHEAPER),
    )
    searches = [
        *((MAIN, system, extent.seeds, extent.knee_s, 0.1) for system in _MAIN_SYSTEMS),
        *(
            (cheaper, system, extent.seeds, extent.side_knee_s, extent.side_tolerance_rps)
            for system in _CHEAPER_SYSTEMS
        ),
    ]
    if extent.has_sides:
        side = (extent.side_knee_s, extent.side_tolerance_rps)
        searches += [(MAIN, system, extent.seeds[:1], *side) for system in _ORDERS]
        searches += [
            (world, system, extent.seeds, *side)
            for world in CALIBRATIONS
            if world is not MAIN
            for system in _SIDE_SYSTEMS
        ]
    bounds = {world.name: _bounds(world) for world in (*CALIBRATIONS, cheaper)}
    jobs: dict[Key, Job] = {}
    for world, system, seeds, duration_s, tolerance_rps in searches:
        timed = replace(world.lasting(duration_s), drain_s=60.0)
        guess_rps = round(_GUESSES.get(system, _GUESS) * bounds[world.name][0], 1)
        jobs[world.name, system] = FindKnee(timed, system, seeds, tolerance_rps, guess_rps)
    return Section(NAME, jobs, lambda results: _findings(results, bounds))


def _findings(results: Results, bounds: dict[str, tuple[float, float]]) -> Findings:
    rows = [
        _row(world, system, knee, results, bounds[world])
        for (world, system), knee in results.items()
    ]
    return Findings([*rows, *_ratio_rows(rows)], _targets(rows))


def _bounds(world: World) -> tuple[float, float]:
    """Of the joint knee, and of that of first tokens."""
    trace = world.scenario(SYSTEMS["fifo"], 8.0, 0).trace
    bound_rps = fluid_bound_rps(trace, world.hardware)
    return bound_rps, fluid_bound_rps(trace, world.hardware, tbt_s=None)


def _row(world: str, system: str, knee: Knee, results: Results, bounds: tuple[float, float]) -> Row:
    joint_bound_rps, ttft_bound_rps = bounds
    baseline: Knee | None = results.get((world, "slora"))
    return {
        "section": NAME,
        "world": world,
        "system": system,
        "seeds": len(knee.ttft_rps),
        "ttft_rps": knee.ttft_median_rps,
        "ttft_spread": f"{min(knee.ttft_rps):g}-{max(knee.ttft_rps):g}",
        "joint_rps": knee.joint_median_rps,
        "joint_spread": f"{min(knee.joint_rps):g}-{max(knee.joint_rps):g}",
        "ttft_x_slora": _over(knee.ttft_median_rps, baseline, lambda k: k.ttft_median_rps),
        "joint_x_slora": _over(knee.joint_median_rps, baseline, lambda k: k.joint_median_rps),
        "joint_bound_rps": joint_bound_rps,
        "ttft_bound_rps": ttft_bound_rps,
        "share_of_joint_bound": knee.joint_median_rps / joint_bound_rps,
    }


def _over(value: float, baseline: Knee | None, of: Callable[[Knee], float]) -> float | None:
    return None if baseline is None else value / of(baseline)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A ratio of two knees, and what it should be on the main calibration."""

    name: str
    measure: str
    system: str
    baseline: str
    target: float
    is_cheaper: bool = False  # the system runs with the cheaper kernels, the baseline does not


_CLAIMS: Final = (
    _Claim("chameleon's TTFT knee over slora's", "ttft", "chameleon", "slora", 1.4),
    _Claim("adaptive's TTFT knee over slora's", "ttft", "adaptive", "slora", 1.5),
    _Claim("adaptive's joint knee over slora's", "joint", "adaptive", "slora", 1.40),
    _Claim("adaptive's joint knee over slora-strong's", "joint", "adaptive", "slora-strong", 1.15),
    _Claim("adaptive's joint knee over chameleon's", "joint", "adaptive", "chameleon", 1.15),
    _Claim(
        "adaptive's joint knee with modelled kernels over slora's",
        "joint",
        "adaptive",
        "slora",
        1.8,
        is_cheaper=True,
    ),
    _Claim(
        "adaptive's joint knee with modelled kernels over slora-strong's",
        "joint",
        "adaptive",
        "slora-strong",
        1.45,
        is_cheaper=True,
    ),
)


def _ratio_rows(rows: list[Row]) -> list[Row]:
    """Every claim in every calibration, beside what the fluid bound allows and what is missing."""
    names = [
        row["world"] for row in rows if row["system"] == "slora" and "cheaper" not in row["world"]
    ]
    return [
        _ratio_row(claim, name, rows) for claim in _CLAIMS for name in names if _has(claim, name)
    ]


def _has(claim: _Claim, world: str) -> bool:
    return not claim.is_cheaper or world == MAIN.name


def _ratio_row(claim: _Claim, world: str, rows: list[Row]) -> Row:
    own, base = _pair(claim, world, rows)
    base_rps: float = base[f"{claim.measure}_rps"]
    ratio = own[f"{claim.measure}_rps"] / base_rps
    limit = own[f"{claim.measure}_bound_rps"] / base_rps
    return {
        "section": NAME,
        "world": world,
        "claim": claim.name,
        "ratio": ratio,
        "target": claim.target,
        "is_target": world == MAIN.name,
        "ratio_at_fluid_bound": limit,
        "missing_lever": _lever(ratio, claim.target, limit),
    }


def _lever(ratio: float, target: float, limit: float) -> str:
    if ratio >= target:
        return "none"
    if limit < target:
        return (
            f"work: {target / limit - 1:.0%} above the bound that no order reaches; cheaper kernels"
        )
    return f"order and steps: {1 - ratio / limit:.0%} below the bound"


def _pair(claim: _Claim, world: str, rows: list[Row]) -> tuple[Row, Row]:
    def find(system: str, *, is_cheaper: bool) -> Any:
        return next(
            row
            for row in rows
            if row["system"] == system
            and row["world"].startswith(world)
            and ("cheaper" in row["world"]) == is_cheaper
        )

    return (
        find(claim.system, is_cheaper=claim.is_cheaper),
        find(claim.baseline, is_cheaper=False),
    )


def _targets(rows: list[Row]) -> list[Target]:
    targets: list[Target] = []
    for claim in _CLAIMS:
        own, base = _pair(claim, MAIN.name, rows)
        ratio = own[f"{claim.measure}_rps"] / base[f"{claim.measure}_rps"]
        targets.append(Target(claim.name, claim.target, ratio, "x"))
    return targets
