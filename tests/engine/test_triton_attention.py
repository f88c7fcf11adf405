"""Attention over the paged cache against fp64, with NaN wherever no context lies."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from services.worker.engine.triton_attention import (
    PART_TOKENS_MIN,
    PARTS,
    AttentionTuning,
    DecodeScratch,
    PrefillPlan,
    decode_attention,
    prefill_attention,
    prefill_positions,
    prefill_tiles,
)
from services.worker.engine.triton_ops import CacheShape
from tests.engine.triton_world import DEVICE, assert_close, random

LAYER = 1
TUNING = AttentionTuning(decode_tokens=16, prefill_rows=16, prefill_tokens=16)


class Contexts:
    """Keys and values of some sequences, `[length, kv_heads, head_dim]`, in a poisoned pool."""

    def __init__(
        self, lengths: Sequence[int], *, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.cache = CacheShape(2, kv_heads, 4, head_dim)
        self.lengths = lengths
        needed = [-(-length // 4) for length in lengths]
        order = np.random.default_rng(1).permutation(sum(needed) + 2)
        shape = (len(order), 2, 2, kv_heads, 4, head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=dtype)
        self.blocks = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
        self.keys = [random(n, kv_heads, head_dim, dtype=dtype, seed=n) for n in lengths]
        self.values = [random(n, kv_heads, head_dim, dtype=dtype, seed=n + 1) for n in lengths]
        taken = 0
        for i, length in enumerate(lengths):
            mine = order[taken : taken + needed[i]]
            taken += needed[i]
            self.blocks[i, : needed[i]] = torch.from_numpy(mine)
            for t in range(length):
                self.pool[mine[t // 4], LAYER, 0, :, t % 4] = self.keys[i][t]
                self.pool[mine[t // 4], LAYER, 1, :, t % 4] = self.values[i][t]

    def reference(self, q: Tensor, sequence: int, position: int) -> Tensor:
        """What a query `[heads, head_dim]` at a position gets, fp64."""
        group = len(q) // self.cache.kv_heads
        keys = self.keys[sequence][: position + 1].double().repeat_interleave(group, dim=1)
        values = self.values[sequence][: position + 1].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,thd->ht", q.double(), keys) * q.shape[1] ** -0.5
        return torch.einsum("ht,thd->hd", scores.softmax(dim=1), values)

    def decode(self, q: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        rows, heads, head_dim = q.shape
        out = torch.full_like(q, float("nan")).to(DEVICE)
        scratch = DecodeScratch.empty(rows, heads, head_dim, torch.device(DEVICE))
        scratch.outputs.fill_(float("nan"))
        scratch.weights.fill_(float("nan"))
        decode_attention(
            q.view(rows, -1).to(DEVICE),
            self.pool.to(DEVICE),
            self.blocks.to(DEVICE),
            torch.tensor(lengths or self.lengths, dtype=torch.int32, device=DEVICE),
            out,
            scratch=scratch,
            cache=self.cache,
            layer=LAYER,
            tuning=TUNING,
        )
        return out.cpu()

    def prefill(self, q: Tensor, rows: Sequence[int]) -> Tensor:
        """`rows`: how many rows at the end of each context are computed; q has them in order."""
        positions = prefill_positions(q.shape[1], self.cache, TUNING)
        segments = [(sum(rows[:i]), n, self.lengths[i] - n) for i, n in enumerate(rows)]
        tiles = prefill_tiles(np.array(rows, dtype=np.int32), positions)
        out = torch.full_like(q, float("nan")).to(DEVICE)
        prefill_attention(
            q.view(len(q), -1).to(DEVICE),
            self.pool.to(DEVICE),
            self.blocks.to(DEVICE),
            PrefillPlan(
                torch.tensor(segments, dtype=torch.int32, device=DEVICE),
                torch.from_numpy(tiles).to(DEVICE),
            ),
            out,
            cache=self.cache,
            layer=LAYER,
            tuning=TUNING,
        )
        return out.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_rows_equal_fp64(dtype: torch.dtype) -> None:
    contexts = Contexts([1, 21, 40], kv_heads=2, head_dim=16, dtype=dtype)
    q = random(3, 8, 16, dtype=dtype)
    expected = torch.stack([contexts.reference(q[i], i, n - 1) for i, n in enumerate([1, 21, 40])])
    assert_close(contexts.decode(q), expected, dtype)


@pytest.mark.parametrize("length", [PART_TOKENS_MIN - 1, PART_TOKENS_MIN + 1, 3 * PART_TOKENS_MIN])
def test_a_context_of_several_parts_equals_fp64(length: int) -> None:
    contexts = Contexts([length], kv_heads=1, head_dim=16, dtype=torch.float32)
    q = random(1, 2, 16, dtype=torch.float32)
    assert_close(contexts.decode(q)[0], contexts.reference(q[0], 0, length - 1), torch.float32)


def test_a_context_with_more_tokens_than_the_smallest_parts_hold_equals_fp64() -> None:
    length = PARTS * PART_TOKENS_MIN + 5
    contexts = Contexts([length], kv_heads=1, head_dim=16, dtype=torch.float32)
    q = random(1, 1, 16, dtype=torch.float32)
    assert_close(contexts.decode(q)[0], contexts.reference(q[0], 0, length - 1), torch.float32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (9, 3), (7, 1)])
def test_any_number_of_heads_may_share_keys(heads: int, kv_heads: int) -> None:
    contexts = Contexts([10], kv_heads=kv_heads, head_dim=16, dtype=torch.float32)
    q = random(1, heads, 16, dtype=torch.float32)
    assert_close(contexts.decode(q)[0], contexts.reference(q[0], 0, 9), torch.float32)


@pytest.mark.parametrize("head_dim", [32, 80, 96])
def test_heads_of_any_size_equal_fp64(head_dim: int) -> None:
    contexts = Contexts([9], kv_heads=1, head_dim=head_dim, dtype=torch.float32)
    q = random(1, 2, head_dim, dtype=torch.float32)
    assert_close(contexts.decode(q)[0], contexts.reference(q[0], 0, 8), torch.float32)
    q = random(5, 2, head_dim, dtype=torch.float32)
    expected = torch.stack([contexts.reference(q[i], 0, 4 + i) for i in range(5)])
    assert_close(contexts.prefill(q, [5]), expected, torch.float32)


def test_a_row_without_a_context_is_zero() -> None:
    contexts = Contexts([6, 6], kv_heads=1, head_dim=16, dtype=torch.float32)
    got = contexts.decode(random(2, 2, 16, dtype=torch.float32), [6, 0])
    assert bool((got[1] == 0).all())
    assert bool(got[0].isfinite().all())


def test_a_decoding_row_does_not_depend_on_its_batch_mates() -> None:
    contexts = Contexts([30, 170], kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    q = random(2, 4, 16, dtype=torch.bfloat16)
    together = contexts.decode(q)
    contexts.blocks, contexts.lengths = contexts.blocks[1:], [170]
    assert torch.equal(contexts.decode(q[1:])[0], together[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prompts_of_several_sequences_equal_fp64(dtype: torch.dtype) -> None:
    lengths = [5, 37, 20]
    contexts = Contexts(lengths, kv_heads=2, head_dim=16, dtype=dtype)
    q = random(sum(lengths), 4, 16, dtype=dtype)
    expected = [
        contexts.reference(q[sum(lengths[:i]) + t], i, t)
        for i, n in enumerate(lengths)
        for t in range(n)
    ]
    assert_close(contexts.prefill(q, lengths), torch.stack(expected), dtype)


def test_a_chunk_sees_the_chunks_before_it() -> None:
    contexts = Contexts([50, 23], kv_heads=1, head_dim=16, dtype=torch.float32)
    rows = [19, 1]
    q = random(20, 3, 16, dtype=torch.float32)
    expected = [contexts.reference(q[t], 0, 31 + t) for t in range(19)]
    expected.append(contexts.reference(q[19], 1, 22))
    assert_close(contexts.prefill(q, rows), torch.stack(expected), torch.float32)


def test_a_prompt_row_equals_the_decoding_row_at_its_position() -> None:
    contexts = Contexts([45], kv_heads=1, head_dim=32, dtype=torch.float32)
    q = random(1, 4, 32, dtype=torch.float32)
    assert_close(contexts.prefill(q, [1]), contexts.decode(q).double(), torch.float32)


def test_tiles_cover_every_prompt_row_once_and_the_longest_come_first() -> None:
    tiles = prefill_tiles(np.array([5, 4, 9], dtype=np.int32), 4)
    assert tiles.tolist() == [[0, 4], [0, 0], [1, 0], [2, 8], [2, 4], [2, 0]]
