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
twice as long, as a chat model's are; where the data is absent, of quantiles fitted to them.

`adaptive`, our default, serves the same queries in `bench.sim`: batches by the step, each query
answers when it ends. Its four replicas use all four devices; UELM-all leaves three of them idle, so
there is a row with one replica too. The card is derived from the same constant (`_hardware`):

- a step of ten sequences takes `step_s`, one of a single sequence 6.3 / 6.8 of it (the same sweep),
  so each further one 0.5 / 9 / 6.8 = 0.82 % of it; a line, also beyond ten. The sweep's 7.8 s for
  five is above both and is left out.
- a prompt token computes as long as a further sequence does, which is more than it really would;
  weights are read meanwhile, so short prompts cost nothing.
- a token's keys and values are 28 KiB (two groups of 128 in 28 layers); 4 GiB of them, enough for
  all hundred queries at their limit, since no card is published.

SLOs are checked at the end, nobody is refused for one.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from statistics import fmean
from typing import Final, Literal

import numpy as np

from bench.report import Report, Row, Target
from bench.sim import Hardware, Result, Scenario, simulate
from bench.workload import Arrival, LengthModel, Trace, load_lengths
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
from services.core.systems import SYSTEMS as OUR_SYSTEMS
from services.core.types import Attempt, GatewayId, Request, RequestId, TenantId
from services.worker.engine.profiles import HardwareProfile

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
OUR_GAINS: Final = {"s3": 0.903, "morphling": 0.723}  # of the mean; these pairs are its two ends
REPLICAS: Final = (4, 1)

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
    theirs = [_row(system, sets, ends, step_s) for system in SYSTEMS]
    ours = [_our_row(replicas, sets, ends, step_s) for replicas in REPLICAS]
    return [row | {"lengths": lengths} for row in (*theirs, *ours)]


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


def serve(queries: Sequence[Request], *, replicas: int, step_s: float) -> Outcome:
    """The same queries through our default system."""
    result = simulate(
        Scenario(
            system=OUR_SYSTEMS["adaptive"],
            hardware=_hardware(step_s),
            trace=Trace("uellm", 1.0, tuple(map(_arrival, queries)), ()),
            workers=replicas,
            sample_s=None,
        )
    )
    return outcome_of(_finished_s(result), queries)


def _hardware(step_s: float) -> Hardware:
    alone_s, ten_s = 6.3, 6.8
    further_ms = (ten_s - alone_s) / 9 / ten_s * step_s * 1e3
    profile = HardwareProfile(
        name="chatglm2-6b",
        vocab_size=65_024,
        eos_token_ids=(2,),
        max_context_tokens=8192,
        num_layers=28,
        kv_bytes_per_token=_CHATGLM2.token_bytes,
        memory_bytes=4 * 2**30,
        fixed_ms=0.0,
        weights_ms=alone_s / ten_s * step_s * 1e3 - further_ms,
        token_ms=further_ms,
        sequence_ms=further_ms,
        cached_token_ms=0.0,
        prefill_lora_ms=0.0,
        decode_lora_ms=0.0,
        rank_token_ms=0.0,
        decode_rank_ms=0.0,
        load_bytes_per_s=1e10,
    )
    return Hardware(profile)


def _arrival(query: Request) -> Arrival:
    return Arrival(
        arrival_s=0.0,
        tenant=query.tenant_id,
        adapter=None,
        prompt_tokens=query.context_tokens,
        output_tokens=query.predicted_output_tokens,
        max_output_tokens=query.max_output_tokens,
    )


def _finished_s(result: Result) -> dict[RequestId, float]:
    return {
        RequestId(f"q{record.index}"): inf if record.end_s is None else record.end_s
        for record in result.requests
    }


def _our_row(replicas: int, sets: Sequence[Sequence[Request]], ends: Ends, step_s: float) -> Row:
    outcomes = [serve(queries, replicas=replicas, step_s=step_s) for queries in sets]
    totals_s = [outcome.total_s for outcome in outcomes]
    return {
        "system": f"adaptive, {replicas} replica{'s' if replicas > 1 else ''}",
        "ends": ends,
        "batches": None,
        "total_s": fmean(totals_s),
        "total_s_min": min(totals_s),
        "total_s_max": max(totals_s),
        "published_s": None,
        "mean_s": fmean(outcome.mean_completion_s for outcome in outcomes),
        "late": fmean(outcome.late for outcome in outcomes),
        "published_late": None,
        "kv_mib": None,
        "kv_mib_by_uellm": None,
        "step_ms": step_s * 1e3,
        "is_calibrated": False,
    }


def _targets(rows: Sequence[Row]) -> list[Target]:
    """As the logs ran, on the lengths that show least."""
    shown = {(row["lengths"], row["system"]): row for row in rows if row["ends"] == "limit"}
    lengths = sorted({length for length, _ in shown})

    def gain(measure: str, system: str, baseline: str) -> float:
        ratios = (shown[one, system][measure] / shown[one, baseline][measure] for one in lengths)
        return float(1 - max(ratios))

    def in_time(system: str) -> float:
        return float(1 - max(row["late"] for row in rows if row["system"] == system))

    names = ("adaptive, 4 replicas", "adaptive, 1 replica")
    return [
        *(
            Target(
                f"total of uelm-all below {base}'s",
                LEAST_GAIN,
                gain("total_s", "uelm-all", base),
                "",
            )
            for base in OUR_GAINS
        ),
        *(
            Target(f"mean of {name} below {base}'s", least, gain("mean_s", name, base), "of it")
            for name in names
            for base, least in OUR_GAINS.items()
        ),
        *(
            Target(f"queries of {name} within their SLO", 1.0, in_time(name), "of all")
            for name in ("uelm-all", *names)
        ),
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
