"""Attention of one pass in plain torch: which rows read which keys, planned once for all layers.

Rows of a pass are ordered: decoding sequences, the shortest context first, then prompt chunks.
Decoding rows of similar lengths are one call over their contexts, padded to the longest one and
masked; another call begins where the padding would cost more than that. A prompt chunk is a call
of its own.

Grouped-query attention needs no copies of keys: query heads that share a KV head are laid out as
the query positions of that head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.common.base_model import ModelConfig
from services.worker.engine.executor import Ints, Segment
from services.worker.engine.kv import PagedCache

# What one more call costs, in cached positions read by a KV head group: about 40 us against 30 ns,
# seen on two cores with three KV heads of 64.
_CALL_POSITIONS = 1024
# From here on, two batched products are faster on the CPU than one call of the fused kernel.
_BATCHED_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of scaled-dot-product attention, over `segments` contexts of up to `length`."""

    rows: slice
    segments: int
    contexts: Tensor
    length: int
    mask: Tensor | None
    is_causal: bool
    is_decode: bool
    is_batched: bool


class Attention:
    """The plan of one pass. Calling it writes keys and values, then attends."""

    def __init__(
        self,
        config: ModelConfig,
        cache: PagedCache,
        segments: Sequence[Segment],
        *,
        positions: Ints,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`segments`: those of one row first, by length. `positions [rows]`: theirs."""
        self._cache = cache
        self._kv_heads = config.num_kv_heads
        self._group = config.num_heads // config.num_kv_heads
        self._head_dim = config.head_dim
        self._q_width = config.num_heads * config.head_dim
        self._places = cache.places(segments, positions)
        self._calls = _Planner(cache, dtype=dtype, device=device).plan(segments)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """`qkv [rows, (heads + 2 * kv_heads) * head_dim] -> [rows, heads * head_dim]`."""
        q = qkv[:, : self._q_width]
        self._cache.write(layer, self._places, qkv[:, self._q_width :])
        outputs: list[Tensor] = []
        for call in self._calls:
            keys, values = self._cache.read(layer, call.contexts, segments=call.segments)
            attend = self._decode if call.is_decode else self._prefill
            keys, values = keys[:, :, : call.length], values[:, :, : call.length]
            outputs.append(attend(call, q[call.rows], keys, values))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, call: _Call, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`q [rows, heads * d]`, keys `[rows, kv_heads, length, d]`: group as query positions."""
        q = q.view(-1, self._kv_heads, self._group, self._head_dim)
        if call.is_batched:
            return _batched_attention(q, keys, values, call.mask).view(-1, self._q_width)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=call.mask)
        return out.reshape(-1, self._q_width)

    def _prefill(self, call: _Call, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`q [rows, heads * d]`, keys `[1, kv_heads, length, d]`: KV heads as the batch."""
        q = q.view(-1, self._kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        shape = (self._kv_heads, self._group, call.length, self._head_dim)
        out = F.scaled_dot_product_attention(
            q,
            keys[0].unsqueeze(1).expand(shape),
            values[0].unsqueeze(1).expand(shape),
            attn_mask=call.mask,
            is_causal=call.is_causal,
        )
        return out.permute(2, 0, 1, 3).reshape(-1, self._q_width)


def _batched_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `q [rows, kv_heads, group, d]` as two batched products, softmax in fp32.

    On the CPU about twice as fast as scaled_dot_product_attention, which goes row by row. Keys
    come first in their product because the other order copies them.
    """
    rows, kv_heads, group, head_dim = q.shape
    scores = torch.bmm(keys.flatten(0, 1), q.flatten(0, 1).transpose(1, 2))
    scores = scores.view(rows, kv_heads, -1, group).transpose(2, 3)
    scaled = torch.empty(scores.shape, dtype=torch.float32, device=q.device)
    torch.mul(scores, head_dim**-0.5, out=scaled)
    if mask is not None:
        scaled += mask
    weights = torch.softmax(scaled, dim=-1).to(values.dtype)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))


class _Planner:
    def __init__(self, cache: PagedCache, *, dtype: torch.dtype, device: torch.device) -> None:
        self._cache = cache
        self._dtype = dtype
        self._device = device

    def plan(self, segments: Sequence[Segment]) -> list[_Call]:
        num_decode = next((i for i, item in enumerate(segments) if item.rows > 1), len(segments))
        calls = [
            self._decode_call(segments[first:end], first)
            for first, end in _runs(segments[:num_decode])
        ]
        row = num_decode
        for segment in segments[num_decode:]:
            calls.append(self._prefill_call(segment, row))
            row += segment.rows
        return calls

    def _decode_call(self, run: Sequence[Segment], first_row: int) -> _Call:
        lengths = [item.end for item in run]
        longest = max(lengths)
        is_large = len(run) > 1 and len(run) * longest >= _BATCHED_POSITIONS
        mask = None
        if min(lengths) < longest:
            hidden = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
            mask = self._mask(hidden).view(len(run), 1, 1, longest)
        return _Call(
            rows=slice(first_row, first_row + len(run)),
            segments=len(run),
            contexts=self._cache.contexts(run),
            length=longest,
            mask=mask,
            is_causal=False,
            is_decode=True,
            is_batched=is_large and self._device.type == "cpu",
        )

    def _prefill_call(self, segment: Segment, first_row: int) -> _Call:
        mask = None
        if segment.start > 0:
            positions = torch.arange(segment.start, segment.end).unsqueeze(1)
            mask = self._mask(torch.arange(segment.end) > positions)
        return _Call(
            rows=slice(first_row, first_row + segment.rows),
            segments=1,
            contexts=self._cache.contexts([segment]),
            length=segment.end,
            mask=mask,
            is_causal=segment.start == 0,
            is_decode=False,
            is_batched=False,
        )

    def _mask(self, hidden: Tensor) -> Tensor:
        """What is added to the scores: nothing where they are seen."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype)
        return mask.masked_fill_(hidden, float("-inf")).to(self._device)


def _runs(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Greedy split of decoding rows into `[first, end)` runs; see the module's rules."""
    runs: list[tuple[int, int]] = []
    for row, segment in enumerate(segments):
        if runs:
            first, end = runs[-1]
            rows, longest = end - first, segments[end - 1].end
            joined = (rows + 1) * segment.end
            if joined <= rows * longest + segment.end + _CALL_POSITIONS:
                runs[-1] = (first, row + 1)
                continue
        runs.append((row, row + 1))
    return runs
