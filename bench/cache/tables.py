"""The tables of docs/cache.md, written from a committed report.

`python -m bench.cache.tables REPORT DOCUMENT` replaces what is between `<!-- table: NAME -->` and
`<!-- end -->`, so that no figure in the document is typed by hand.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.report import Row

_BLOCK: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SERVED: Final = {
    "favourites": "world",
    "policy": "policy",
    "hit rate": "hit_rate",
    "seeds": "spread",
    "GiB per 1,000": "gib_per_1000",
    "x lru": "bytes_x_lru",
    "P50 TTFT, s": "p50_ttft_s",
    "P99 TTFT, s": "p99_ttft_s",
}
_OVERLAP: Final = {
    "adapters in": "adapters in",
    "a load runs": "a load",
    "cache": "cache",
    "hit rate": "hit_rate",
    "P50 TTFT, s": "p50_ttft_s",
    "P99 TTFT, s": "p99_ttft_s",
    "seeds": "p99_ttft_spread",
    "P99, x blocking": "p99_x_blocking",
}
_TARGETS: Final = {"": "name", "target": "target", "measured": "value", "holds": "holds"}


def main() -> None:
    """Rewrite the document in place."""
    report, document = map(Path, sys.argv[1:])
    text = document.read_text(encoding="utf-8")
    document.write_text(filled(text, json.loads(report.read_text())), encoding="utf-8")


def filled(text: str, report: dict[str, Any]) -> str:
    """The text with its tables. Raises KeyError for a table of an unknown name."""
    rows = [row for row in report["rows"] if row["section"] != "lacking"]
    tables = {
        "hits": _by_regime(rows, "hit_rate"),
        "bytes": _by_regime(rows, "gib_per_1000"),
        "served": _markdown(_SERVED, _of(rows, "served")),
        "overlap": _markdown(_OVERLAP, _of(rows, "overlap")),
        "targets": _markdown(_TARGETS, report["targets"]),
    }

    def table(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return begin + tables[name] + end

    return _BLOCK.sub(table, text)


def _of(rows: Sequence[Row], section: str) -> list[Row]:
    return [row for row in rows if row["section"] == section]


def _by_regime(rows: Sequence[Row], measure: str) -> str:
    """A line per policy, a column per regime."""
    replays = _of(rows, "replay")
    regimes = list(dict.fromkeys(row["regime"] for row in replays))
    lines: dict[str, Row] = {}
    for row in replays:
        line = lines.setdefault(row["policy"], {"policy": row["policy"]})
        line[row["regime"]] = row[measure]
    return _markdown({name: name for name in ("policy", *regimes)}, list(lines.values()))


def _markdown(columns: dict[str, str], rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
