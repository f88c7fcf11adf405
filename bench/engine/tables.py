"""From samples to rows and targets: the table of what an engine on this CPU has to reach.

A ratio's target is per tier: compiled code (native) and plain torch. Where a peer is absent the
value is NaN, which holds nowhere.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.engine.measures import OUTPUT_TOKENS, PROMPT_TOKENS, Measure, Sample, Samples, median
from bench.engine.models import Subject
from bench.engine.systems import TIERS
from bench.engine.unused import Unused
from bench.report import Row, Target

BASE_1: Final = Measure("base 1", 1)
BASE_8: Final = Measure("base 8", 8)
BASE_32: Final = Measure("base 32", 32)
MIXED_8: Final = Measure("mixed 8", 8, mixed=True)
MIXED_32: Final = Measure("mixed 32", 32, mixed=True)
_REFERENCE: Final = "peft"  # whose first tokens others are compared with
_KEPT_MIN: Final = 0.99


@dataclass(frozen=True, slots=True)
class _Ratio:
    """`field` of each tier over that of a peer on "small", at least so much by tier.

    `inverse`: the field is a time, so the peer's over ours.
    """

    measure: Measure
    field: str
    peer: str
    at_least: Mapping[str, float]
    inverse: bool = False


_RATIOS: Final = (
    _Ratio(MIXED_32, "tokens_per_s", "peft", {"native": 9, "torch": 6}),
    _Ratio(MIXED_32, "tokens_per_s", "vllm_lora", {"native": 25, "torch": 18}),
    _Ratio(MIXED_32, "ttft_s", "peft", {"native": 7, "torch": 7}, inverse=True),
    _Ratio(BASE_1, "decode_tokens_per_s", "llama_cpp", {"native": 1.2, "torch": 0.6}),
    _Ratio(BASE_8, "decode_tokens_per_s", "llama_cpp", {"native": 2, "torch": 1.1}),
    _Ratio(BASE_8, "decode_tokens_per_s", "vllm", {"native": 2, "torch": 1.1}),
    _Ratio(BASE_32, "decode_tokens_per_s", "llama_cpp", {"native": 1.7, "torch": 1.1}),
    _Ratio(BASE_32, "decode_tokens_per_s", "vllm", {"native": 1.6, "torch": 1.0}),
)
_FIELD_NAMES: Final = {
    "tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "ttft_s": "time to first token",
}
_FLOOR_SHARE_MIN: Final = 0.95  # native: of the byte floor
_RETENTION_MIN: Final = 0.62  # torch
_READ_SHARE_MIN: Final = {"native": 0.80, "torch": 0.45}


def system_rows(samples: Sequence[Sample]) -> list[Row]:
    """Each system at each measure: medians, and the least and the greatest."""
    found = Samples(samples)
    keys = dict.fromkeys((one.subject, one.measure, one.system) for one in samples)
    return [_system_row(found, key) for key in sorted(keys)]


def _system_row(found: Samples, key: tuple[str, str, str]) -> Row:
    of = found.of(*key)
    speeds = [one.answer["tokens_per_s"] for one in of]
    decodes = [one.answer["decode_tokens_per_s"] for one in of]
    return {
        "model": key[0],
        "measure": key[1],
        "system": key[2],
        "alternations": len(of),
        "tokens_per_s": median(speeds),
        "least": min(speeds),
        "greatest": max(speeds),
        "decode_tokens_per_s": median(decodes),
        "decode_least": min(decodes),
        "decode_greatest": max(decodes),
        "ttft_ms": 1e3 * median(one.answer["ttft_s"] for one in of),
        "read_gb_per_s": median(one.read_bytes_per_s for one in of) / 1e9,
        "same_first_token": _same_first_token(found, key),
    }


def _same_first_token(found: Samples, key: tuple[str, str, str]) -> float | None:
    """The share of requests whose first token is the reference's.

    Engines round differently, so with random weights a few differ. Where the reference takes no
    part our torch tier is one; None without either.
    """
    subject, measure, system = key
    reference = found.of(subject, measure, _REFERENCE) or found.of(subject, measure, "torch")
    if not reference:
        return None
    wanted = reference[0].answer["first_token_ids"]
    got = found.of(subject, measure, system)[0].answer["first_token_ids"]
    same = sum(int(a == b) for a, b in zip(got, wanted, strict=True))
    return same / len(wanted)


def alternation_rows(samples: Sequence[Sample]) -> list[Row]:
    """Every answer, with what memory gave beside it."""
    return [
        {
            "alternation": one.alternation,
            "model": one.subject,
            "measure": one.measure,
            "system": one.system,
            "tokens_per_s": one.answer["tokens_per_s"],
            "decode_tokens_per_s": one.answer["decode_tokens_per_s"],
            "ttft_ms": 1e3 * one.answer["ttft_s"],
            "read_gb_per_s": one.read_bytes_per_s / 1e9,
            "load_average": one.load_average,
        }
        for one in samples
    ]


def peer_targets(samples: Sequence[Sample], peers: Collection[str]) -> list[Target]:
    """Ratios to these peers on the small model."""
    found = Samples(samples)
    asked = [ratio for ratio in _RATIOS if ratio.peer in peers]
    return [_peer_target(found, ratio, tier) for ratio in asked for tier in TIERS]


def _peer_target(found: Samples, ratio: _Ratio, tier: str) -> Target:
    ours, peer = (("small", ratio.measure.name, name) for name in (tier, ratio.peer))
    first, second = (peer, ours) if ratio.inverse else (ours, peer)
    what = _FIELD_NAMES[ratio.field]
    pair = f"{ratio.peer} over {tier}" if ratio.inverse else f"{tier} over {ratio.peer}"
    value = found.ratio(first, second, ratio.field)
    return Target(f"{ratio.measure.name}: {what}, {pair}", ratio.at_least[tier], value, "x")


def byte_floor(subject: Subject, measure: Measure) -> float:
    """The throughput that is left if only the bytes count which a decode step has to read.

    Weights and keys and values of the mean context, over the same and the batch's adapters.
    """
    tokens = measure.batch * (PROMPT_TOKENS + OUTPUT_TOKENS // 2)
    shared = subject.read_bytes + subject.kv_bytes(tokens)
    used = {index % len(subject.adapters) for index in range(measure.batch)}
    return shared / (shared + sum(subject.adapter_bytes(index) for index in used))


def retention_rows(samples: Sequence[Sample], subject: Subject) -> list[Row]:
    """Of each system that has both: mixed over base, in decoding, in the same alternation."""
    found = Samples(samples)
    floor = byte_floor(subject, MIXED_8)
    systems = dict.fromkeys(one.system for one in samples if one.subject == subject.name)
    rows = [(system, _retention(found, subject, system)) for system in systems]
    return [
        {
            "retention": system,
            "model": subject.name,
            "mixed_over_base": value,
            "byte_floor": floor,
            "of_the_floor": value / floor,
        }
        for system, value in rows
        if not math.isnan(value)  # it has both
    ]


def _retention(found: Samples, subject: Subject, system: str) -> float:
    mixed = (subject.name, MIXED_8.name, system)
    base = (subject.name, BASE_8.name, system)
    return found.ratio(mixed, base, "decode_tokens_per_s")


def large_model_targets(samples: Sequence[Sample], subject: Subject) -> list[Target]:
    """What is kept with adapters, and how much of the memory's rate one request uses."""
    found = Samples(samples)
    floor = byte_floor(subject, MIXED_8)
    what = f"{subject.name}, {len(subject.adapters)} adapters, batch 8: kept of the base's decoding"
    kept = {tier: _retention(found, subject, tier) for tier in TIERS}
    targets = [
        Target(f"{what}, native, of the byte floor", _FLOOR_SHARE_MIN, kept["native"] / floor, ""),
        Target(f"{what}, torch", _RETENTION_MIN, kept["torch"], ""),
    ]
    for tier in TIERS:
        share = found.figure(
            (subject.name, BASE_1.name, tier), lambda one: read_share(one, subject)
        )
        name = f"{subject.name}, base 1: share of the read bandwidth, {tier}"
        targets.append(Target(name, _READ_SHARE_MIN[tier], share, ""))
    return targets


def read_share(one: Sample, subject: Subject) -> float:
    """Bytes that decoding one request has to read, over what memory gives in that time."""
    step_bytes = subject.read_bytes + subject.kv_bytes(PROMPT_TOKENS + OUTPUT_TOKENS // 2)
    return float(one.answer["decode_tokens_per_s"] * step_bytes / one.read_bytes_per_s)


def unused_rows(unused: Mapping[str, Unused]) -> list[Row]:
    """Medians of the decode steps of 32 base requests."""
    return [
        {
            "lora_unused": tier,
            "turns": len(one.with_adapters_s),
            "step_ms_with_adapters": 1e3 * median(one.with_adapters_s),
            "step_ms_without": 1e3 * median(one.without_s),
            "kept": one.kept,
        }
        for tier, one in unused.items()
    ]


def unused_targets(unused: Mapping[str, Unused]) -> list[Target]:
    """At most one percent lost."""
    return [
        Target(
            f"adapters in memory, none used: kept of the decoding, {tier}",
            _KEPT_MIN,
            unused[tier].kept if tier in unused else float("nan"),
            "",
        )
        for tier in TIERS
    ]


def absent_rows(absent: Iterable[tuple[str, str, str]]) -> list[Row]:
    """Each is (model, system, why); of a long why the first and the last line."""
    return [
        {"absent": system, "model": model, "why": " … ".join(_ends(why.splitlines()))}
        for model, system, why in absent
    ]


def _ends(lines: Sequence[str]) -> Sequence[str]:
    return lines if len(lines) < 2 else [lines[0], lines[-1]]
