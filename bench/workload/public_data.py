"""Public traces and length tables, from a folder that is not part of the project.

The folder is `$CALUMMA_SHARED/data`, or `shared/data` beside the checkout. Every reader returns
None where its file is absent: the callers then use generators fitted to published statistics.
"""

import csv
import functools
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_AZURE: Final = {
    "azure-conv": "azure/AzureLLMInferenceTrace_conv.csv.gz",
    "azure-code": "azure/AzureLLMInferenceTrace_code.csv.gz",
}


def data_folder() -> Path:
    """Where the data would be."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("CALUMMA_SHARED", beside)) / "data"


@functools.cache
def read_arrivals(name: str) -> Floats | None:
    """Arrival times of a recorded trace, seconds from an arbitrary origin, ascending."""
    if (path := _path(_AZURE[name])) is None:
        return None
    stamps = np.array([row["TIMESTAMP"] for row in _rows(path)], dtype="datetime64[ns]")
    return np.sort((stamps - stamps[0]).astype(np.float64) / 1e9)


@functools.cache
def read_pairs(name: str) -> tuple[Ints, Ints] | None:
    """Prompt and output tokens of "azure-conv", "azure-code", "arxiv" or "sharegpt"."""
    match name:
        case "arxiv":
            return _pairs(
                "lengths/arxiv_summarization_lengths.csv.gz",
                ("num_prefill_tokens",),
                "num_decode_tokens",
            )
        case "sharegpt":  # a turn's prompt is the conversation so far and what is asked
            return _pairs("lengths/sharegpt_lengths.csv.gz", ("ctx_tok", "p_tok"), "r_tok")
        case _:
            return _pairs(_AZURE[name], ("ContextTokens",), "GeneratedTokens")


@functools.cache
def read_clients(name: str) -> dict[str, Floats] | None:
    """ServeGen's clients of "m-large" or "m-mid" whose lengths are known.

    `q` [103], `in_q` and `out_q` [clients, 103], `rate` [clients], the mean over its 14 days.
    """
    if (path := _path(f"servegen/{name}.npz")) is None:
        return None
    with np.load(path) as arrays:
        known = (arrays["in_q"].min(axis=1) >= 0) & (arrays["out_q"].min(axis=1) >= 0)
        return {
            "q": arrays["q"].astype(np.float64),
            "in_q": arrays["in_q"][known].astype(np.float64),
            "out_q": arrays["out_q"][known].astype(np.float64),
            "rate": arrays["rate"][known].mean(axis=1).astype(np.float64),
        }


def _pairs(relative: str, prompt: tuple[str, ...], output: str) -> tuple[Ints, Ints] | None:
    if (path := _path(relative)) is None:
        return None
    rows = [(sum(int(row[name]) for name in prompt), int(row[output])) for row in _rows(path)]
    table = np.array(rows, dtype=np.int64)
    return np.maximum(1, table[:, 0]), np.maximum(1, table[:, 1])


def _path(relative: str) -> Path | None:
    path = data_folder() / relative
    return path if path.is_file() else None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
