"""Which tokens one step computes.

Stall-free batching as in Sarathi-Serve: every step first gives each decoding request its one token,
then fills the rest with chunks of prompts, oldest request first, up to a token budget. So a long
prompt costs the others a bounded delay per step, and decoding never waits for a prompt.

Memory: a decode may preempt younger requests, a prompt may not: its chunk shrinks to the blocks
there are. A prompt is short of blocks only while decodes hold more than they were promised; these
go on, so a step is never empty while something could run.
"""

from collections.abc import Sequence as Ordered
from typing import Protocol

from services.core.sequence import Sequence


class Grant(Protocol):
    """Makes KV blocks for the next tokens of a sequence; returns for how many there are now."""

    def __call__(self, sequence: Sequence, tokens: int, *, preempts: bool) -> int: ...


def form_step(
    runnable: Ordered[Sequence], *, prefill_tokens: int, grant: Grant
) -> list[tuple[Sequence, int]]:
    """The sequences of the next step with their token counts; `runnable` is oldest first."""
    decodes = [sequence for sequence in runnable if sequence.uncomputed_tokens == 1]
    prefills = [sequence for sequence in runnable if sequence.uncomputed_tokens > 1]
    step = [
        (sequence, 1)
        for sequence in decodes
        if sequence.is_admitted and grant(sequence, 1, preempts=True)
    ]
    budget_tokens = prefill_tokens
    for sequence in prefills:
        wanted_tokens = min(budget_tokens, sequence.uncomputed_tokens)
        if wanted_tokens == 0 or not sequence.is_admitted:
            continue
        tokens = grant(sequence, wanted_tokens, preempts=False)
        if tokens == 0:
            break
        step.append((sequence, tokens))
        budget_tokens -= tokens
    return step
