"""The tables of docs/policies.md, written from a committed report.

`python -m bench.policies.tables REPORT DOCUMENT` replaces what is between `<!-- table: NAME -->`
and `<!-- end -->`, so that no figure in the document is typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.report import Row

_BLOCK: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHOWN_RPS: Final = 8.0  # of the regimes
_NEVER: Final = "-"  # a value that never came: no end, no first token, no such figure


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, heading to name, of the rows of a section that have all of them."""

    section: str
    columns: dict[str, str]
    shows: Callable[[Row], bool] = lambda _: True


TABLES: Final = {
    "knees": Table(
        "knees",
        {
            "calibration": "world",
            "system": "system",
            "TTFT knee": "ttft_rps",
            "seeds": "ttft_spread",
            "joint knee": "joint_rps",
            "seeds ": "joint_spread",
            "joint, x slora": "joint_x_slora",
            "of the bound": "share_of_joint_bound",
        },
    ),
    "claims": Table(
        "knees",
        {
            "ratio": "claim",
            "calibration": "world",
            "measured": "ratio",
            "target": "target",
            "at the bound": "ratio_at_fluid_bound",
            "missing lever": "missing_lever",
        },
    ),
    "loads": Table(
        "loads",
        {
            "RPS": "rate_rps",
            "system": "system",
            "P50 TTFT, s": "p50_ttft_s",
            "P99 TTFT, s": "p99_ttft_s",
            "seeds": "p99_ttft_spread",
            "P99 TBT, s": "p99_tbt_s",
            "P99 slowdown small": "p99_slowdown_small",
            "medium": "p99_slowdown_medium",
            "large": "p99_slowdown_large",
            "longest wait, s": "max_wait_s",
            "P50, x slora - 1": "p50_change",
            "P99, x slora - 1": "p99_change",
            "paper P50": "published_p50",
            "paper P99": "published_p99",
        },
    ),
    "cuts": Table(
        "loads",
        {
            "less time to first token": "claim",
            "measured": "cut",
            "target": "target",
            "if all were alone": "cut_if_alone",
            "missing lever": "missing_lever",
        },
    ),
    "regimes": Table(
        "regimes",
        {
            "regime": "world",
            "system": "system",
            "P50 TTFT, s": "p50_ttft_s",
            "P99 TTFT, s": "p99_ttft_s",
            "P99 TBT, s": "p99_tbt_s",
            "longest wait, s": "max_wait_s",
            "hit rate": "hit_rate",
        },
        lambda row: row["rate_rps"] == _SHOWN_RPS and "evicts" not in row["system"],
    ),
    "evictions": Table(
        "regimes",
        {
            "regime": "world",
            "system": "system",
            "hit rate": "hit_rate",
            "loads per request": "loads_per_request",
            "P99 TTFT, s": "p99_ttft_s",
        },
        lambda row: "evicts" in row["system"],
    ),
    "predictors": Table(
        "predictors",
        {
            "memory": "memory",
            "predictor": "predictor",
            "fifo P99 TTFT, s": "p99_ttft_s_fifo",
            "adaptive P99 TTFT, s": "p99_ttft_s_adaptive",
            "ratio": "p99_ttft_x_fifo",
        },
    ),
    "parts": Table(
        "parts",
        {
            "world": "world",
            "RPS": "rate_rps",
            "system": "system",
            "P50 TTFT, s": "p50_ttft_s",
            "P99 TTFT, s": "p99_ttft_s",
            "hit rate": "hit_rate",
            "returned": "returns",
        },
    ),
    "sizes": Table(
        "sizes",
        {
            "system": "system",
            "P99 TTFT small, s": "p99_ttft_s_small",
            "medium": "p99_ttft_s_medium",
            "large": "p99_ttft_s_large",
            "longest wait small, s": "max_wait_s_small",
            "medium ": "max_wait_s_medium",
            "large ": "max_wait_s_large",
        },
    ),
    "tenants": Table(
        "tenants",
        {
            "system": "system",
            "others' P99 TTFT quiet, s": "p99_quiet_s",
            "noisy, s": "p99_noisy_s",
            "ratio": "p99_x_quiet",
            "Jain noisy": "jain_noisy",
            "noisy tokens/s": "noisy_tokens_per_s",
        },
    ),
    "scale": Table(
        "scale",
        {
            "workers": "workers",
            "adapters": "adapters",
            "requests": "requests",
            "CPU, s": "cpu_s",
            "P99 TTFT, s": "p99_ttft_s",
        },
    ),
    "faults": Table(
        "faults",
        {
            "fault": "fault",
            "system": "system",
            "lost": "lost",
            "submitted again": "returns",
            "P99 TTFT, s": "p99_ttft_s",
            "longest gap, s": "max_gap_s",
        },
    ),
}


def main() -> None:
    """Rewrite the document in place."""
    report, document = map(Path, sys.argv[1:])
    text = document.read_text(encoding="utf-8")
    document.write_text(filled(text, json.loads(report.read_text())), encoding="utf-8")


def filled(text: str, report: dict[str, Any]) -> str:
    """The text with its tables. Raises KeyError for a table of an unknown name."""

    def table(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return begin + _table(name, report) + end

    return _BLOCK.sub(table, text)


def _table(name: str, report: dict[str, Any]) -> str:
    if name == "targets":
        columns = {"": "name", "target": "target", "measured": "value", "holds": "holds"}
        return _markdown(columns, report["targets"])
    table = TABLES[name]
    keys = set(table.columns.values())
    rows = [
        row
        for row in report["rows"]
        if row["section"] == table.section and keys <= row.keys() and table.shows(row)
    ]
    return _markdown(table.columns, rows)


def _markdown(columns: dict[str, str], rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row[name]) for name in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return _NEVER if value is None else str(value)


if __name__ == "__main__":
    main()
