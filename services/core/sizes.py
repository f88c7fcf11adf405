"""How large a request is: Chameleon's weighted request size (paper §4.3.1) and adapters as tokens.

    degree 2:  WRS = (A·In/MaxIn + B·Out/MaxOut) · Adapter/MaxAdapter        A = 0.4, B = 0.6
    linear:    WRS =  A·In/MaxIn + B·Out/MaxOut + C·Adapter/MaxAdapter

In counts the prompt, Out the predicted output, Adapter its bytes. A request that comes back keeps
its size: what it has generated counts as output, not as prompt.

The paper leaves open:
- MaxIn, MaxOut, MaxAdapter: a high quantile of recent requests (`maxima_of`), or configured. Larger
  requests get terms above 1, so their order is kept.
- a request without adapter, whose size would be 0: no adapter counts less than `base_share` of the
  largest. The default is the smallest rank of the paper over its largest, 8 / 128.
- C: 0.5, the mean of A and B.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.core.types import Adapter, Request

SizeForm = Literal["degree2", "linear"]


@dataclass(frozen=True, slots=True)
class Maxima:
    """What sizes are relative to. All positive."""

    input_tokens: float
    output_tokens: float
    adapter_bytes: float


@dataclass(frozen=True, slots=True)
class SizeWeights:
    """A, B and C, and the least that an adapter counts."""

    form: SizeForm = "degree2"
    input: float = 0.4
    output: float = 0.6
    adapter: float = 0.5  # of the linear form only
    base_share: float = 1 / 16


def input_tokens(request: Request) -> int:
    """The prompt, whichever the attempt."""
    return request.context_tokens - request.prior_output_tokens


def output_tokens(request: Request) -> int:
    """The predicted output of all attempts; at least one, at most what it may generate."""
    return max(1, min(request.predicted_output_tokens, request.max_output_tokens))


def weighted_size(request: Request, maxima: Maxima, weights: SizeWeights) -> float:
    """WRS, above 0; about 1 for the largest."""
    lengths = (
        weights.input * input_tokens(request) / maxima.input_tokens
        + weights.output * output_tokens(request) / maxima.output_tokens
    )
    adapter_bytes = request.adapter.size_bytes if request.adapter is not None else 0
    share = max(weights.base_share, adapter_bytes / maxima.adapter_bytes)
    return lengths * share if weights.form == "degree2" else lengths + weights.adapter * share


def maxima_of(requests: Iterable[Request], quantile: float) -> Maxima:
    """That quantile of each quantity; the smallest request seen that is not below it."""
    rows = [
        (input_tokens(one), output_tokens(one), one.adapter.size_bytes if one.adapter else 0)
        for one in requests
    ]
    highest = np.quantile(np.array(rows, dtype=float), quantile, axis=0, method="higher")
    return Maxima(*(max(1.0, float(value)) for value in highest))


def adapter_tokens(adapter: Adapter | None, token_bytes: float) -> int:
    """The adapter's bytes in tokens of KV cache; 4 · rank for all of q, k, v, o (S-LoRA)."""
    return 0 if adapter is None else math.ceil(adapter.size_bytes / token_bytes)
