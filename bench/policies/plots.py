"""Figures as PNG bytes. No state is shared between them, and no file is written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from matplotlib.figure import Figure

from bench.sim import Sample

_SIZE_INCHES: Final = (8.0, 4.5)
_DPI: Final = 120


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot; infinite values are left out."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over a common axis, and the limit that they should stay below."""

    title: str
    lines: Sequence[Line]
    limit: float


def load_plot(panels: Sequence[Panel]) -> bytes:
    """Panels side by side: seconds, on a logarithmic axis, against requests per second."""
    figure = Figure(figsize=(_SIZE_INCHES[0] * 1.4, _SIZE_INCHES[1]), layout="constrained")
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for line in panel.lines:
            axes.plot(line.xs, line.ys, marker="o", label=line.label)
        axes.axhline(panel.limit, color="grey", linestyle="--", linewidth=1)
        axes.set_title(panel.title)
        axes.set_xlabel("requests/s")
        axes.set_ylabel("seconds")
        axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    return _png(figure)


def bar_plot(groups: Mapping[str, Mapping[str, float]], *, title: str, y: str) -> bytes:
    """A group of bars per name, a bar of the same colour per series."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    names = list(groups)
    series = list(next(iter(groups.values())))
    width = 0.8 / len(series)
    for place, label in enumerate(series):
        xs = [i - 0.4 + width * (place + 0.5) for i in range(len(names))]
        axes.bar(xs, [groups[name][label] for name in names], width, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    return _png(figure)


def timeline_plot(samples: Sequence[Sample], *, title: str) -> bytes:
    """Queue lengths above; tokens in use and quotas (dashed) below, a colour per queue."""
    figure = Figure(figsize=(_SIZE_INCHES[0], 6.5), layout="constrained")
    lengths, tokens = figure.subplots(2, 1, sharex=True)
    count = max(len(sample.queues) for sample in samples)
    for place in range(count):
        mine = [(s.time_s, s.queues[place]) for s in samples if place < len(s.queues)]
        times_s = [time_s for time_s, _ in mine]
        colour = f"C{place}"
        lengths.plot(times_s, [q.length for _, q in mine], color=colour, label=f"queue {place}")
        tokens.plot(times_s, [q.used_tokens for _, q in mine], color=colour, linewidth=0.8)
        quotas = [float("nan") if q.quota_tokens is None else q.quota_tokens for _, q in mine]
        tokens.plot(times_s, quotas, color=colour, linestyle="--")
    lengths.set_title(title)
    lengths.set_ylabel("requests queued")
    lengths.legend()
    tokens.set_ylabel("KV tokens: in use, quota (dashed)")
    tokens.set_xlabel("seconds")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
