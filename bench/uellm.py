"""UELLM's experiment (2409.14961): a hundred queries at once, its systems and the two it beats.

The published logs are run through a model with few constants, to see what the gain consists of. All
queries are there at the start; their batches are the real ones of `services.core.policies`; a batch
runs alone, to its end, and answers when it ends. Lengths are known to all systems, as in the
authors' code. What a batch takes is

    seconds = step_s · tokens generated · hop factor of the devices that the model is split over

- `step_s` is the one calibrated constant: UELM-all's published total gives it. All other rows are
  predictions. It does not depend on the batch: the authors' sweep has 6.3 s for one query and 6.8 s
  for ten on one device. Prompts are short and not counted.
- Hop factors are that sweep's for ten queries: 6.8 / 11.8 / 10.5 / 11.9 s on 1 / 2 / 3 / 4 devices.
- Tokens generated: a batch runs to the limit it was given, which is 1,024 but for UELM-all, whose
  limit is its longest member's length + 50 (`ends = "limit"`). Or it ends with its longest member
  (`ends = "longest"`), as a batch should. Both are shown; the published totals are nearer the
  first, but for S3, whose limit is not known.
- Morphling first runs the whole set on two devices as its stress test. The total counts that, as in
  the logs; the SLOs, which could not be met otherwise, do not.

Lengths are not published. They are those of public Alpaca answers, and of ShareGPT's, which are
twice as long, as a chat model's are; where the data is absent, of quantiles fitted to them. Another
system is put beside these by `make_queries` and `outcome_of`; UELM-all leaves three of its four
devices idle, so one that uses all four has to say so.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Final, Literal

import numpy as np

from bench.report import Report, Row, Target
from bench.workload import LengthModel, load_lengths
from bench.workload.lengths import Fitted, Table
from bench.workload.public_data import data_folder
from services.core.policies.static_batches import (
    Batch,
    UellmConfig,
    form_batches,
    morphling_batches,
    s3_batches,
)
from services.core.resource_profile import KvShape, uellm_kv_bytes
from services.core.types import Attempt, GatewayId, Request, RequestId, TenantId

QUERIES: Final = 100
SEEDS: Final = (1, 2, 3, 4, 5)
LIMIT_TOKENS: Final = 1024
HOP_FACTORS: Final = {1: 1.0, 2: 11.8 / 6.8, 3: 10.5 / 6.8, 4: 11.9 / 6.8}
SLOS_S: Final = ((220, 250), (180, 220), (150, 180), (100, 120), (90, 100))  # of 20 queries each
PUBLISHED: Final = {  # mean of five runs: seconds, share of queries later than their SLO
    "s3": (533.6, 0.46),
    "morphling": (339.2, 0.30),
    "uelm-batch": (254.4, 0.13),
    "uelm-deploy": (129.1, 0.23),
    "uelm-all": (65.2, 0.0),
}
LEAST_GAIN: Final = 0.723  # the paper's range is 72.3 to 90.3 % less than one or the other

_CHATGLM2 = KvShape(layers=28, kv_heads=2, head_dim=128)
_CHATGLM2_HIDDEN = 4096
_MARGIN_TOKENS = 50  # UELM-all's, over its longest member
_ALPACA = Fitted(
    "alpaca (fitted)",
    prompt=((0.0, 4), (0.1, 8), (0.5, 15), (0.9, 34), (0.99, 87), (1.0, 170)),
    output=((0.0, 2), (0.1, 11), (0.5, 106), (0.9, 362), (0.99, 509), (1.0, 594)),
)

Ends = Literal["limit", "longest"]


@dataclass(frozen=True, slots=True)
class System:
    """How a system batches, and where it runs."""

    name: str
    batches: Callable[[Sequence[Request]], tuple[Batch, ...]]
    devices: int
    limits_by_length: bool = False
    tested_on: int | None = None  # devices of a stress test with the whole set


SYSTEMS: Final = (
    System("s3", s3_batches, devices=4),
    System("morphling", morphling_batches, devices=1, tested_on=2),
    System("uelm-batch", lambda q: form_batches(q, UellmConfig(length_weight=0.3)), devices=4),
    System("uelm-deploy", morphling_batches, devices=1),
    System("uelm-all", lambda q: form_batches(q, UellmConfig()), devices=1, limits_by_length=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run of the queries went."""

    total_s: float
    mean_completion_s: float
    late: float  # share of queries that ended after their SLO


def run(*, quick: bool) -> Report:
    """All systems on all seeds, by both lengths and both ways to end."""
    seeds = SEEDS[:2] if quick else SEEDS
    rows: list[Row] = []
    for lengths in (alpaca_lengths(), load_lengths("sharegpt")):
        sets = [make_queries(lengths, seed) for seed in seeds]
        for ends in ("limit", "longest"):
            rows += _rows(sets, ends, lengths.name)
    return Report(rows, _targets(rows))


def make_queries(lengths: LengthModel, seed: int) -> tuple[Request, ...]:
    """A hundred queries that arrive at 0 s; their SLO is their deadline, their length is known."""
    rng = np.random.default_rng(seed)
    prompts, outputs = lengths.draw(np.zeros(QUERIES, dtype=np.int64), rng)
    slos_s = [rng.integers(*bounds, endpoint=True) for bounds in SLOS_S for _ in range(20)]
    return tuple(
        _query(index, int(prompt), min(LIMIT_TOKENS, int(output)), float(slo_s))
        for index, (prompt, output, slo_s) in enumerate(zip(prompts, outputs, slos_s, strict=True))
    )


def outcome_of(finished_s: dict[RequestId, float], queries: Iterable[Request]) -> Outcome:
    """What completion times come to, whoever produced them: this model, a simulator, a service."""
    ends_s = [(finished_s[query.attempt.request_id], query.deadline_s) for query in queries]
    return Outcome(
        total_s=max(end_s for end_s, _ in ends_s),
        mean_completion_s=fmean(end_s for end_s, _ in ends_s),
        late=fmean(slo_s is not None and end_s > slo_s for end_s, slo_s in ends_s),
    )


def execute(system: System, queries: Sequence[Request], *, ends: Ends, step_s: float) -> Outcome:
    """One batch after the other, each to its end."""
    now_s = 0.0
    finished_s: dict[RequestId, float] = {}
    for batch in system.batches(queries):
        now_s += step_s * _tokens(system, batch, ends) * HOP_FACTORS[system.devices]
        finished_s.update((query.attempt.request_id, now_s) for query in batch)
    outcome = outcome_of(finished_s, queries)
    if system.tested_on is None:
        return outcome
    tested_s = now_s / HOP_FACTORS[system.devices] * HOP_FACTORS[system.tested_on]
    return Outcome(outcome.total_s + tested_s, outcome.mean_completion_s + tested_s, outcome.late)


def calibrated_step_s(sets: Sequence[Sequence[Request]], ends: Ends) -> float:
    """Seconds per generated token that make UELM-all's mean total the published one."""
    system = next(system for system in SYSTEMS if system.name == "uelm-all")
    per_step = fmean(execute(system, queries, ends=ends, step_s=1.0).total_s for queries in sets)
    return PUBLISHED["uelm-all"][0] / per_step


@cache
def alpaca_lengths() -> LengthModel:
    """Public Alpaca pairs, or what is fitted to them."""
    path = data_folder() / "tasks" / "alpaca_en_demo.jsonl.gz"
    if not path.is_file():
        return _ALPACA
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    prompts, outputs = (np.array([pair[key] for pair in pairs]) for key in ("p_tok", "r_tok"))
    return Table("alpaca", np.maximum(1, prompts), np.maximum(1, outputs))


def _rows(sets: Sequence[Sequence[Request]], ends: Ends, lengths: str) -> list[Row]:
    step_s = calibrated_step_s(sets, ends)
    return [_row(system, sets, ends, step_s) | {"lengths": lengths} for system in SYSTEMS]


def _row(system: System, sets: Sequence[Sequence[Request]], ends: Ends, step_s: float) -> Row:
    outcomes = [execute(system, queries, ends=ends, step_s=step_s) for queries in sets]
    totals_s = [outcome.total_s for outcome in outcomes]
    batches = [batch for queries in sets for batch in system.batches(queries)]
    published_s, published_late = PUBLISHED[system.name]
    peak_tokens = max(_padded_tokens(system, batch, ends) for batch in batches)
    theirs = uellm_kv_bytes(
        sequences=1, layers=_CHATGLM2.layers, hidden=_CHATGLM2_HIDDEN, tokens=peak_tokens
    )
    return {
        "system": system.name,
        "ends": ends,
        "batches": len(batches) / len(sets),
        "total_s": fmean(totals_s),
        "total_s_min": min(totals_s),
        "total_s_max": max(totals_s),
        "published_s": published_s,
        "mean_s": fmean(outcome.mean_completion_s for outcome in outcomes),
        "late": fmean(outcome.late for outcome in outcomes),
        "published_late": published_late,
        "kv_mib": _CHATGLM2.token_bytes * peak_tokens / 2**20,
        "kv_mib_by_uellm": theirs / 2**20,
        "step_ms": step_s * 1e3,
        "is_calibrated": system.name == "uelm-all",
    }


def _targets(rows: Sequence[Row]) -> list[Target]:
    """As the logs ran, on the lengths that show least."""
    total_s = {
        (row["lengths"], row["system"]): row["total_s"] for row in rows if row["ends"] == "limit"
    }
    lengths = {length for length, _ in total_s}
    late = max(row["late"] for row in rows if row["system"] == "uelm-all")
    gains = {
        name: min(1.0 - total_s[one, "uelm-all"] / total_s[one, name] for one in lengths)
        for name in ("s3", "morphling")
    }
    return [
        *(
            Target(f"total of uelm-all below {name}'s", LEAST_GAIN, gain, "of it")
            for name, gain in gains.items()
        ),
        Target("queries of uelm-all within their SLO", 1.0, 1.0 - late, "of all"),
    ]


def _limit_tokens(system: System, batch: Batch) -> int:
    if not system.limits_by_length:
        return LIMIT_TOKENS
    return min(LIMIT_TOKENS, _longest(batch) + _MARGIN_TOKENS)


def _tokens(system: System, batch: Batch, ends: Ends) -> int:
    limit_tokens = _limit_tokens(system, batch)
    return limit_tokens if ends == "limit" else min(limit_tokens, _longest(batch))


def _padded_tokens(system: System, batch: Batch, ends: Ends) -> int:
    """KV cache of a batch when it ends: all of it is as long as its longest."""
    prompt_tokens = max(query.context_tokens for query in batch)
    return len(batch) * (prompt_tokens + _tokens(system, batch, ends))


def _longest(batch: Batch) -> int:
    return max(query.predicted_output_tokens for query in batch)


def _query(index: int, prompt_tokens: int, output_tokens: int, slo_s: float) -> Request:
    return Request(
        attempt=Attempt(RequestId(f"q{index}")),
        gateway_id=GatewayId("bench"),
        tenant_id=TenantId("bench"),
        adapter=None,
        context_tokens=prompt_tokens,
        prior_output_tokens=0,
        max_output_tokens=LIMIT_TOKENS,
        predicted_output_tokens=output_tokens,
        output_tokens_q90=output_tokens,
        priority=0,
        arrived_s=0.0,
        deadline_s=slo_s,
    )
