"""LoRA of the embedding and of the output head: one pair each, in front of the layers and behind.

Rare, so these rows are computed adapter by adapter, and a step without such an adapter does nothing
here. As in PEFT, a head that shares its weights with the embedding is adapted as the head only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.lora.cpu import LoraSegment
from services.worker.lora.layout import LoraPair


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Rows of a step, by index, that one pair adapts."""

    rows: Tensor
    pair: LoraPair

    def add_embedding(self, hidden: Tensor, token_ids: Tensor) -> None:
        """Add to `hidden [rows, hidden]` fp32: a token takes its column of A `[rank, vocab]`."""
        ranks = self.pair.a.index_select(1, token_ids[self.rows]).t()
        added = (ranks @ self.pair.bt).float()
        hidden.index_add_(0, self.rows, added, alpha=self.pair.scale)

    def add_head(self, logits: Tensor, x: Tensor, vocab: slice) -> None:
        """Add to `logits [rows, tokens]`, what the head made of `x [rows, hidden]`.

        `vocab`: of which tokens they are.
        """
        added = (x[self.rows] @ self.pair.a.t()) @ self.pair.bt[:, vocab]
        logits.index_add_(0, self.rows, added, alpha=self.pair.scale)


def adapted_rows(
    segments: Sequence[LoraSegment], pairs: Mapping[str, LoraPair], *, device: torch.device
) -> list[AdaptedRows]:
    """The rows of each adapter that has a pair. `pairs`: by digest."""
    rows: dict[str, list[int]] = {}
    for segment in segments:
        if segment.digest is not None and segment.digest in pairs:
            rows.setdefault(segment.digest, []).extend(range(segment.rows.start, segment.rows.stop))
    return [
        AdaptedRows(torch.tensor(indices).to(device), pairs[digest])
        for digest, indices in rows.items()
    ]
