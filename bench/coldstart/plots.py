"""The figure: where the time to the first token goes, by where the adapter is."""

from collections.abc import Mapping
from io import BytesIO

from matplotlib.figure import Figure


def stages_plot(stages: Mapping[str, Mapping[str, float]], ttft_s: Mapping[str, float]) -> bytes:
    """A bar of stacked stages (seconds) per place; a mark where the first token came.

    A mark below the end of its bar is time hidden: stages that ran at once.
    """
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = list(stages)
    bottoms = [0.0] * len(names)
    for stage in next(iter(stages.values())):
        heights = [stages[name][stage] for name in names]
        axes.bar(names, heights, 0.5, bottom=bottoms, label=stage)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.plot(names, [ttft_s[name] for name in names], "k_", markersize=60, label="first token")
    axes.set_ylabel("seconds")
    axes.set_title("time to first token, by where the adapter was")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
