"""What is measured: batches of requests, what one answer to each says, and how answers compare.

An alternation asks every system once for each measure, one system right after the other, so that a
ratio compares two runs within seconds of each other. Its median over alternations is the figure.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.engine.models import Subject

PROMPT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 64
_SEED: Final = 1000
_FIRST_WORD: Final = 3  # ids below are special


@dataclass(frozen=True, slots=True)
class Measure:
    """`mixed`: request i uses adapter i modulo their number; else all use the base model."""

    name: str
    batch: int
    mixed: bool = False

    def command(self, subject: Subject, *, output_tokens: int, seed: int = _SEED) -> dict[str, Any]:
        """What every system is asked. `seed`: of the prompts."""
        adapters = [i % len(subject.adapters) if self.mixed else None for i in range(self.batch)]
        return {
            "kind": "batch",
            "prompts": prompts(subject, self.batch, seed=seed),
            "adapters": adapters,
            "output_tokens": output_tokens,
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `read_bytes_per_s`: of memory, the better of right before and right after."""

    subject: str
    measure: str
    system: str
    alternation: int
    answer: Mapping[str, Any]
    read_bytes_per_s: float
    load_average: float


def prompts(subject: Subject, count: int, *, seed: int) -> list[list[int]]:
    """So many prompts of random tokens, the same for the same seed."""
    draw = random.Random(seed)
    top = subject.config.vocab_size
    return [[draw.randrange(_FIRST_WORD, top) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


class Samples:
    """All answers so far, and what is compared of them. A figure that has no samples is NaN."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def of(self, subject: str, measure: str, system: str) -> list[Sample]:
        """In the order of alternations."""
        return [
            one
            for one in self._samples
            if (one.subject, one.measure, one.system) == (subject, measure, system)
        ]

    def ratio(self, ours: tuple[str, str, str], other: tuple[str, str, str], field: str) -> float:
        """Median over alternations of a field of `ours` over that of `other`.

        Each is (subject, measure, system); alternations that lack one of the two don't count.
        """
        mine = {one.alternation: one.answer[field] for one in self.of(*ours)}
        theirs = {one.alternation: one.answer[field] for one in self.of(*other)}
        return median(mine[turn] / theirs[turn] for turn in mine if turn in theirs)

    def figure(self, of: tuple[str, str, str], value: Callable[[Sample], float]) -> float:
        """Median over alternations of what `value` makes of each sample."""
        return median(value(one) for one in self.of(*of))


def median(values: Any) -> float:
    """NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")
