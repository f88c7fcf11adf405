"""The forward pass of one model on one device, as the engine asks for it.

The engine knows sequences, an executor knows rows: which tokens, at which positions, with which
adapter, and in which blocks of the pool the keys and values of their contexts lie. Tokens of all
sequences of a step are the rows of one pass. A pass may stop behind any layer and go on later.

Executors: plain torch on the CPU (`torch_executor`), compiled code on the CPU (`native_executor`),
Triton kernels on CUDA (`cuda_executor`). They agree up to rounding. `parallel` has one of them for
each of several devices, and is one itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.adapter_container import ContainerHeader
from services.worker.engine.sampling import Draw, SamplingRow

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one sequence, at positions `start` to `end - 1` of its context.

    Position p lies in `blocks[p // block_tokens]`; there are blocks up to `end` at least. Keys and
    values of the positions before `start` are there already. `digest` None: the base model.
    """

    digest: str | None
    start: int
    rows: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.rows


@dataclass(slots=True)
class Pass:
    """Rows on their way through the layers, together. Segments of one row come first."""

    segments: tuple[Segment, ...]
    token_ids: Ints  # [rows]
    positions: Ints  # [rows]
    wanted: Ints  # rows whose next token is drawn behind the last layer, ascending
    layers: int = 0  # that it has passed
    state: object = None  # the executor's, while it is under way

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


class Scores(Protocol):
    """The next-token logits of rows, wherever they are."""

    def draw(self, rows: Sequence[SamplingRow]) -> list[Draw | None]:
        """One draw for each, in order; None where the logits are not finite."""
        ...


class Executor(Protocol):
    """All calls come from one thread, but for `begin_adapter` and `extend_adapter`.

    Those, and their errors, are as in `services.worker.engine.api.Engine`.
    """

    @property
    def description(self) -> str:
        """In a few words, for logs: what computes, where, in which type."""
        ...

    def begin_adapter(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None: ...

    def extend_adapter(self, digest: str, layers: int) -> None: ...

    def remove_adapter(self, digest: str) -> None: ...

    def ready_layers(self, digest: str) -> int:
        """How many layers of an adapter that was begun may be used."""
        ...

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """These begin to hold another context: nothing of what they held may be seen in it."""
        ...

    def run(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> Scores | None:
        """Take each pass to a layer of its own, and advance its `layers`.

        Returns the logits of the wanted rows of those that reached the end, in order; None when
        there are none.
        """
        ...
