"""Attention of one step: which rows read which keys, planned once and run in every layer.

Rows of a step are ordered: decoding sequences by slot, then prefill chunks. Decoding rows whose
slots are neighbours form a run, and a run is one call over a dense view of the cache, padded to its
longest sequence and masked. A run ends where the slots have a gap, or where the padding would cost
more than another call. A prefill chunk is a call of its own.

Grouped-query attention needs no copies of keys: query heads that share a KV head are laid out as
the query positions of that head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.common.base_model import ModelConfig
from services.worker.engine.kv import KVCache

# What one more call costs, in cached positions read by a KV head group: about 40 us against 30 ns,
# seen on two cores with three KV heads of 64.
_CALL_POSITIONS = 1024
# From here on, two batched products are faster on the CPU than one call of the fused kernel.
_BATCHED_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one sequence: positions `start` to `start + rows - 1` of its slot."""

    slot: int
    start: int
    rows: int

    @property
    def end(self) -> int:
        return self.start + self.rows


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of scaled-dot-product attention. `slots` is one slot for a prefill chunk."""

    rows: slice
    slots: slice
    length: int
    mask: Tensor | None
    is_causal: bool
    is_decode: bool
    is_batched: bool


class Attention:
    """The plan of one step. Calling it writes keys and values, then attends."""

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        segments: Sequence[Segment],
        *,
        kv_rows: Tensor,
    ) -> None:
        """`segments`: those of one row first, by slot. `kv_rows`: see `KVCache.rows_of`."""
        self._cache = cache
        self._kv_rows = kv_rows
        self._kv_heads = config.num_kv_heads
        self._group = config.num_heads // config.num_kv_heads
        self._head_dim = config.head_dim
        self._q_width = config.num_heads * config.head_dim
        self._calls = _plan(segments, dtype=cache.keys[0].dtype, device=cache.keys[0].device)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """`qkv [rows, (heads + 2 * kv_heads) * head_dim] -> [rows, heads * head_dim]`."""
        q = qkv[:, : self._q_width]
        self._cache.write(layer, self._kv_rows, qkv[:, self._q_width :])
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        outputs = [
            (self._decode if call.is_decode else self._prefill)(
                call,
                q[call.rows],
                keys[call.slots, :, : call.length],
                values[call.slots, :, : call.length],
            )
            for call in self._calls
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, call: _Call, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`q [slots, heads * d]`, keys `[slots, kv_heads, length, d]`: group as query positions."""
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
    """Attention of `q [slots, kv_heads, group, d]` as two batched products, softmax in fp32.

    On the CPU about twice as fast as scaled_dot_product_attention, which goes slot by slot. Keys
    come first in their product because the other order copies them.
    """
    slots, kv_heads, group, head_dim = q.shape
    scores = torch.bmm(keys.flatten(0, 1), q.flatten(0, 1).transpose(1, 2))
    scores = scores.view(slots, kv_heads, -1, group).transpose(2, 3)
    scaled = torch.empty(scores.shape, dtype=torch.float32)
    torch.mul(scores, head_dim**-0.5, out=scaled)
    if mask is not None:
        scaled += mask
    weights = torch.softmax(scaled, dim=-1).to(values.dtype)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))


def _plan(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> list[_Call]:
    num_decode = next((i for i, item in enumerate(segments) if item.rows > 1), len(segments))
    calls = [
        _decode_call(segments[first:end], first, dtype, device)
        for first, end in _runs(segments[:num_decode])
    ]
    row = num_decode
    for segment in segments[num_decode:]:
        calls.append(_prefill_call(segment, row, dtype, device))
        row += segment.rows
    return calls


def _runs(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Greedy split of decoding rows into `[first, end)` runs; see the module's rules."""
    runs: list[tuple[int, int]] = []
    for row, segment in enumerate(segments):
        if runs:
            first, end = runs[-1]
            rows, longest = end - first, max(item.end for item in segments[first:end])
            joined = (rows + 1) * max(longest, segment.end)
            apart = rows * longest + segment.end + _CALL_POSITIONS
            if segment.slot == segments[row - 1].slot + 1 and joined <= apart:
                runs[-1] = (first, row + 1)
                continue
        runs.append((row, row + 1))
    return runs


def _decode_call(
    run: Sequence[Segment], first_row: int, dtype: torch.dtype, device: torch.device
) -> _Call:
    lengths = [item.end for item in run]
    longest = max(lengths)
    is_large = len(run) > 1 and len(run) * longest >= _BATCHED_POSITIONS
    mask = None
    if min(lengths) < longest:
        hidden = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.view(len(run), 1, 1, longest).to(device)
    return _Call(
        rows=slice(first_row, first_row + len(run)),
        slots=slice(run[0].slot, run[-1].slot + 1),
        length=longest,
        mask=mask,
        is_causal=False,
        is_decode=True,
        is_batched=is_large and device.type == "cpu",
    )


def _prefill_call(
    segment: Segment, first_row: int, dtype: torch.dtype, device: torch.device
) -> _Call:
    mask = None
    if segment.start > 0:
        positions = torch.arange(segment.start, segment.end).unsqueeze(1)
        hidden = torch.arange(segment.end) > positions
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
    return _Call(
        rows=slice(first_row, first_row + segment.rows),
        slots=slice(segment.slot, segment.slot + 1),
        length=segment.end,
        mask=mask,
        is_causal=segment.start == 0,
        is_decode=False,
        is_batched=False,
    )
