"""Whether the native step computes the right thing here: asked once per process, before it serves.

A random model of two layers, with an adapter, takes a prompt in two chunks and one more token. Its
logits must be near those of the formulas below, which are fp64 and as plain as can be.
"""

from ctypes import addressof
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.worker.native.library import (
    Library,
    Linear,
    ModelShape,
    Module,
    NativeError,
    NativeModel,
    Norm,
    PassRows,
    ScoreRows,
    SegmentRows,
    Unavailable,
    load,
)

Floats = NDArray[np.float64]

_LAYERS: Final = 2
_HIDDEN, _FFN, _VOCAB = 64, 96, 72
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 16
_Q_WIDTH, _KV_WIDTH = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
_BLOCK_TOKENS, _BLOCKS = 4, 3
_CHUNKS: Final = (5, 3, 1)  # tokens, all in one sequence
_RANK, _SCALE = 3, 0.5
_EPS: Final = 1e-5
# The largest error of a logit over the largest logit. Rounding to bf16 makes less than 0.02; a
# wrong formula makes about 1.
_ERROR_MAX: Final = 0.08


@cache
def find_library() -> Library | Unavailable:
    """The library, if it is there and right."""
    library = load()
    if isinstance(library, Unavailable):
        return library
    try:
        error = probe(library)
    except NativeError as failure:
        return Unavailable(f"its probe failed: {failure}")
    if not error <= _ERROR_MAX:  # NaN, too
        return Unavailable(f"its probe is wrong by {error:.2g} of the largest logit")
    return library


def probe(library: Library) -> float:
    """The largest error of a logit over the largest logit. Raises NativeError."""
    weights = _Weights.random(seed=3)
    token_ids = np.random.default_rng(4).integers(0, _VOCAB, sum(_CHUNKS)).astype(np.int32)
    expected = weights.logits(token_ids)
    actual = _native_logits(library, weights, token_ids)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@dataclass(frozen=True, slots=True)
class _Layer:
    norms: tuple[Floats, Floats]
    qkv: Floats  # [out, in]
    o: Floats
    gate_up: Floats
    down: Floats
    a: Floats  # [rank, q width], of the adapter of o
    bt: Floats  # [rank, hidden]


@dataclass(frozen=True, slots=True)
class _Weights:
    """All values are bf16 numbers. The head is not tied."""

    embedding: Floats
    head: Floats
    norm: Floats
    layers: tuple[_Layer, ...]
    cos: Floats  # [positions, head_dim / 2]
    sin: Floats

    @staticmethod
    def random(*, seed: int) -> "_Weights":
        generator = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> Floats:
            values = generator.standard_normal((rows, columns)) / np.sqrt(columns)
            return _rounded(values)

        layers = tuple(
            _Layer(
                norms=(matrix(1, _HIDDEN)[0] + 1, matrix(1, _HIDDEN)[0] + 1),
                qkv=matrix(_Q_WIDTH + 2 * _KV_WIDTH, _HIDDEN) * 2,
                o=matrix(_HIDDEN, _Q_WIDTH),
                gate_up=matrix(2 * _FFN, _HIDDEN),
                down=matrix(_HIDDEN, _FFN),
                a=matrix(_RANK, _Q_WIDTH),
                bt=matrix(_RANK, _HIDDEN) * 4,
            )
            for _ in range(_LAYERS)
        )
        angles = np.outer(np.arange(sum(_CHUNKS)), 10.0 ** -np.linspace(0, 2, _HEAD_DIM // 2))
        return _Weights(
            embedding=matrix(_VOCAB, _HIDDEN) * 8,
            head=matrix(_VOCAB, _HIDDEN),
            norm=matrix(1, _HIDDEN)[0] + 1,
            layers=layers,
            cos=np.cos(angles),
            sin=np.sin(angles),
        )

    def logits(self, token_ids: NDArray[np.int32]) -> Floats:
        """`[tokens, vocab]`"""
        hidden = self.embedding[token_ids]
        for layer in self.layers:
            attended = self._attention(_normed(hidden, layer.norms[0]) @ layer.qkv.T)
            hidden = hidden + attended @ layer.o.T + _SCALE * (attended @ layer.a.T) @ layer.bt
            gate_up = _normed(hidden, layer.norms[1]) @ layer.gate_up.T
            gate, up = gate_up[:, :_FFN], gate_up[:, _FFN:]
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ layer.down.T
        return np.asarray(_normed(hidden, self.norm) @ self.head.T)

    def _attention(self, qkv: Floats) -> Floats:
        heads = qkv.reshape(len(qkv), -1, _HEAD_DIM)
        q = self._rotated(heads[:, :_HEADS])
        keys = self._rotated(heads[:, _HEADS : _HEADS + _KV_HEADS])
        keys = keys.repeat(_HEADS // _KV_HEADS, axis=1)
        values = heads[:, _HEADS + _KV_HEADS :].repeat(_HEADS // _KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(_HEAD_DIM)
        scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.asarray(np.einsum("hqk,khd->qhd", weights, values), dtype=np.float64)
        return attended.reshape(len(qkv), -1)

    def _rotated(self, x: Floats) -> Floats:
        a, b = np.split(x, 2, axis=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _normed(x: Floats, weight: Floats) -> Floats:
    square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float64)
    return x / np.sqrt(square + _EPS) * weight


def _native_logits(
    library: Library, weights: _Weights, token_ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    shape = ModelShape(
        layers=_LAYERS,
        hidden=_HIDDEN,
        ffn=_FFN,
        heads=_HEADS,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        vocab=_VOCAB,
        block_tokens=_BLOCK_TOKENS,
        max_positions=len(token_ids),
        threads=2,
        norm_eps=_EPS,
    )
    model = NativeModel(library, shape)
    kept = [_load(model, weights)]
    adapter = model.open_adapter()
    for index, layer in enumerate(weights.layers):
        a, bt = _bf16(layer.a), _bf16(layer.bt)
        kept += [a, bt]
        rows = (a.ctypes.data, bt.ctypes.data)
        adapter.set_pair((index, Module.O_PROJ), _RANK, rows, scale=_SCALE)
    cache = np.zeros((_BLOCKS, 2 * _LAYERS * _BLOCK_TOKENS * _KV_WIDTH), dtype=np.uint16)
    model.set_cache(cache.ctypes.data, _BLOCKS)
    logits = np.zeros((len(token_ids), _VOCAB), dtype=np.float32)
    start = 0
    for count in _CHUNKS:
        end = start + count
        _run(model, adapter.handle, token_ids[start:end], start=start, logits=logits[start:end])
        start = end
    return logits


def _load(model: NativeModel, weights: _Weights) -> NDArray[np.uint16]:
    """Returns the embedding, which must stay."""
    _set_linear(model, (0, Linear.HEAD), weights.head)
    _set_norm(model, (0, Norm.FINAL), weights.norm)
    for index, layer in enumerate(weights.layers):
        _set_linear(model, (index, Linear.QKV), layer.qkv)
        _set_linear(model, (index, Linear.O), layer.o)
        _set_linear(model, (index, Linear.GATE_UP), layer.gate_up)
        _set_linear(model, (index, Linear.DOWN), layer.down)
        _set_norm(model, (index, Norm.INPUT), layer.norms[0])
        _set_norm(model, (index, Norm.FFN), layer.norms[1])
    cos, sin = weights.cos.astype(np.float32), weights.sin.astype(np.float32)
    model.set_rotation(cos.ctypes.data, sin.ctypes.data)
    embedding = _bf16(weights.embedding)
    model.set_embedding(embedding.ctypes.data)
    return embedding


def _set_linear(model: NativeModel, at: tuple[int, Linear], weight: Floats) -> None:
    rows = _bf16(weight)
    model.set_linear(at, rows.ctypes.data, (rows.shape[0], rows.shape[1]), bias=None)


def _set_norm(model: NativeModel, at: tuple[int, Norm], weight: Floats) -> None:
    values = weight.astype(np.float32)
    model.set_norm(at, values.ctypes.data, len(values))


def _run(
    model: NativeModel,
    adapter: int,
    token_ids: NDArray[np.int32],
    *,
    start: int,
    logits: NDArray[np.float32],
) -> None:
    """Fills `logits [tokens, vocab]`."""
    count = len(token_ids)
    blocks = np.array([2, 0, 1], dtype=np.int32)
    wanted = np.arange(count, dtype=np.int32)
    hidden = np.empty((count, _HIDDEN), dtype=np.float32)
    best, highest = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.float32)
    addresses = (logits.ctypes.data + logits.strides[0] * np.arange(count)).astype(np.uint64)
    segment = SegmentRows(start=start, rows=count, blocks=blocks.ctypes.data, adapter=adapter)
    rows = PassRows(
        rows=count,
        segments=1,
        token_ids=token_ids.ctypes.data,
        segment=addressof(segment),
        first_layer=0,
        until_layer=_LAYERS,
        hidden=hidden.ctypes.data,
        wanted=count,
        wanted_rows=wanted.ctypes.data,
    )
    model.run([rows], ScoreRows(best.ctypes.data, highest.ctypes.data, addresses.ctypes.data))


def _rounded(values: Floats) -> Floats:
    """To numbers that bf16 has: half up, which is near enough for a random model."""
    bits = values.astype(np.float32).view(np.uint32) + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def _bf16(values: Floats) -> NDArray[np.uint16]:
    """The bits of numbers that bf16 has."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
