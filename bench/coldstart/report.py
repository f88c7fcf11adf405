"""What was found, as rows and targets."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.coldstart.crowd import CrowdResult
from bench.coldstart.link import Link
from bench.coldstart.neighbours import Neighbours
from bench.coldstart.plots import stages_plot
from bench.coldstart.turns import Round, Seen, kinds, median_stage_s, median_ttft_s
from bench.report import Report, Row, Target

LOOPBACK: Final = "loopback"
RATE_MIN: Final = 0.7
TTFT_RATIO_MAX: Final = 1.3
HIDDEN_MIN: Final = 0.6
NEIGHBOURS_MAX: Final = 1.1


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured over one way between worker and store. `link` None: loopback."""

    link: Link | None
    rounds: Sequence[Round]
    neighbours: Neighbours | None

    @property
    def name(self) -> str:
        return LOOPBACK if self.link is None else self.link.name


def report(
    found: Sequence[Found],
    crowd: CrowdResult,
    speeds: Mapping[str, Sequence[float]],
    *,
    size_bytes: int,
) -> Report:
    """Rows of all ways, targets of each."""
    plain = statistics.median(speeds["plain"])
    rows: list[Row] = [
        {"over": way.name, **_request_row(kind, seen)}
        for way in found
        for kind, seen in kinds(way.rounds).items()
        if seen
    ]
    rows += [_hidden_row(way) for way in found]
    rows += [_cpu_row(way) for way in found]
    rows += [
        {"over": way.name, **row}
        for way in found
        if way.neighbours is not None
        for row in way.neighbours.rows()
    ]
    rows += [_speed_row(kind, turns) for kind, turns in speeds.items()]
    rows.append(crowd.row())
    targets = [target for way in found for target in _targets(way, plain, size_bytes)]
    worker = statistics.median(speeds["worker"])
    targets += [
        Target("downloads of a crowd's adapter", 1.0, crowd.downloads, "", is_upper=True),
        Target("loopback: worker's rate over a plain stream's", RATE_MIN, worker / plain, "x"),
    ]
    stages, ttft_s = _stages(found)
    return Report(rows, targets, {"ttft.png": stages_plot(stages, ttft_s)})


def _targets(way: Found, plain_bytes_s: float, size_bytes: int) -> list[Target]:
    """Over a link the plain rate is the link's own: nothing can be faster."""
    by_kind = kinds(way.rounds)
    rate = plain_bytes_s if way.link is None else way.link.bytes_per_s
    first_byte_s = 0.0 if way.link is None else way.link.delay_s
    plain_s = first_byte_s + size_bytes / rate
    allowed_s = TTFT_RATIO_MAX * plain_s + median_ttft_s(by_kind["device"])
    targets = [
        Target(
            f"{way.name}: cold TTFT over {TTFT_RATIO_MAX:g} x plain transfer + warm TTFT",
            1.0,
            median_ttft_s(by_kind["store"]) / allowed_s,
            "x",
            is_upper=True,
        ),
        Target(f"{way.name}: of a cold load hidden", HIDDEN_MIN, _median_hidden(way), "share"),
    ]
    if way.neighbours is not None:
        targets.append(
            Target(
                f"{way.name}: others' p99 time between tokens, cold loads over warm requests",
                NEIGHBOURS_MAX,
                way.neighbours.ratio,
                "x",
                is_upper=True,
            )
        )
    if way.link is not None:
        download_s = median_stage_s(by_kind["store, 1-token prompt"], "download_s")
        share = size_bytes / download_s / way.link.bytes_per_s
        targets.append(Target(f"{way.name}: worker's rate over the link's", RATE_MIN, share, "x"))
    return targets


def _median_hidden(way: Found) -> float:
    return statistics.median(one.hidden for one in way.rounds)


def _request_row(kind: str, seen: Sequence[Seen]) -> Row:
    ttft_s = [one.answer.ttft_s for one in seen]
    return {
        "adapter_in": kind,
        "requests": len(seen),
        "ttft_s": statistics.median(ttft_s),
        "ttft_min_s": min(ttft_s),
        "ttft_max_s": max(ttft_s),
        "queue_s": statistics.median(one.answer.queue_s for one in seen),
        "wait_s": median_stage_s(seen, "wait_s"),
        "download_s": median_stage_s(seen, "download_s"),
        "engine_s": median_stage_s(seen, "engine_s"),
        "first_layers_s": median_stage_s(seen, "first_layers_s"),
        "prefill_s": statistics.median(one.answer.prefill_s for one in seen),
    }


def _hidden_row(way: Found) -> Row:
    hidden = [one.hidden for one in way.rounds]
    return {
        "over": way.name,
        "rounds": len(hidden),
        "hidden": statistics.median(hidden),
        "hidden_min": min(hidden),
        "hidden_max": max(hidden),
    }


def _cpu_row(way: Found) -> Row:
    """Medians of what one load takes, by process; 0 for one that is not on the way."""
    used_s = [one.load_cpu_s for one in way.rounds]
    names = ("worker", "adapter_store", "s3", "link")
    return {
        "over": way.name,
        **{
            f"{name}_cpu_s_per_load": statistics.median(one.get(name, 0.0) for one in used_s)
            for name in names
        },
    }


def _speed_row(kind: str, turns: Sequence[float]) -> Row:
    return {
        "transfer": f"{LOOPBACK}, {kind}",
        "turns": len(turns),
        "mb_per_s": statistics.median(turns) / 1e6,
        "mb_per_s_min": min(turns) / 1e6,
        "mb_per_s_max": max(turns) / 1e6,
    }


def _stages(found: Sequence[Found]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """A bar for each tier of the first way, and for the store over the others."""
    seen: dict[str, Sequence[Seen]] = {}
    for way in found:
        by_kind = kinds(way.rounds)
        if way is found[0]:
            seen |= {kind: by_kind[kind] for kind in ("device", "host") if by_kind[kind]}
        seen[f"store, {way.name}"] = by_kind["store"]
    rows: dict[str, Any] = {kind: _request_row(kind, some) for kind, some in seen.items()}
    names = ("queue", "wait", "download", "engine", "prefill")
    stages = {kind: {name: float(row[f"{name}_s"]) for name in names} for kind, row in rows.items()}
    return stages, {kind: float(row["ttft_s"]) for kind, row in rows.items()}
