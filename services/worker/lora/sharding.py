"""An adapter's rows over the shards of a model: each shard gets what its own linears need, no more.

For a linear split by outputs (q, k, v, gate, up) a shard has all of A and its columns of Bᵀ; for
one split by inputs (o, down) its columns of A and all of Bᵀ. What the second kind adds is part of
the sum that the base model's output needs anyway:

    sum over shards of (x_i W_iᵀ + scale x_i A_iᵀ Bᵀ)  =  x Wᵀ + scale x Aᵀ Bᵀ

So an adapter costs no communication of its own. S-LoRA (Sheng et al. 2023, section 6) also splits
the A and Bᵀ that are whole here, and gathers or sums the rows of rank between the two products:
four more collectives per layer. Chosen by bytes and time, for Llama 3 8B over 2 shards: a shard has
0.68 of an adapter's rows instead of 0.50. A step with 32 adapters of rank 16 reads 0.47 GB more, a
tenth of a millisecond of an H200's memory; 128 more collectives, at 8 us each, take ten times that.

Rows of the embedding and of the head stay whole: rare, and a step reads few of them or, of the
head, its own columns of Bᵀ. True ranks everywhere, no padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.adapter_container import (
    DTYPE_BYTES,
    ContainerHeader,
    LayerChunk,
    ModuleEntry,
)
from services.worker.engine.parallel_shard import SPLITS, Shard

_WORDS: Final = {2: np.uint16, 4: np.uint32}  # values are moved, never computed with
_Words = NDArray[np.uint16 | np.uint32]


@dataclass(frozen=True, slots=True)
class AdapterShard:
    """One shard's part of an adapter: `header` describes it as an adapter of the shard's model.

    Layers keep the digests of the whole layers that they were cut from.
    """

    shard: Shard
    whole: ContainerHeader
    header: ContainerHeader

    def copy(self, payload: memoryview, out: memoryview, *, entries: slice) -> None:
        """Cut these modules' rows out of the whole payload, to where they lie in the part's."""
        words = _WORDS[DTYPE_BYTES[self.whole.dtype]]
        source = np.frombuffer(payload, dtype=words)
        target = np.frombuffer(out, dtype=words)
        pairs = zip(self.whole.modules[entries], self.header.modules[entries], strict=True)
        for whole, own in pairs:
            a, bt = _matrices(source, whole)
            own_a, own_bt = _matrices(target, own)
            inputs, outputs = _parts(whole, self.shard)
            own_a[...] = a[:, inputs]
            own_bt[...] = bt[:, outputs]


def shard_adapter(header: ContainerHeader, shard: Shard) -> AdapterShard:
    """`header`: of an adapter that fits the whole model, which divides over the shards."""
    itemsize = DTYPE_BYTES[header.dtype]
    modules: list[ModuleEntry] = []
    offset = 0
    for entry in header.modules:
        inputs, outputs = _parts(entry, shard)
        own = replace(
            entry,
            in_features=inputs.stop - inputs.start,
            out_features=outputs.stop - outputs.start,
            offset=offset,
        )
        modules.append(own)
        offset += own.rank * (own.in_features + own.out_features) * itemsize
    layers = tuple(_chunks(header.layers, modules, offset))
    own_header = replace(header, modules=tuple(modules), layers=layers, payload_bytes=offset)
    return AdapterShard(shard, header, own_header)


def entries_below(header: ContainerHeader, layers: int, *, num_layers: int) -> int:
    """How many modules, in the payload's order, an adapter's first `layers` layers are.

    All of a model's layers are all modules, the head's too.
    """
    if layers == num_layers:
        return len(header.modules)
    return sum(entry.layer < layers for entry in header.modules)


def _parts(entry: ModuleEntry, shard: Shard) -> tuple[slice, slice]:
    """The columns of A and those of Bᵀ that a shard has."""
    inputs, outputs = slice(0, entry.in_features), slice(0, entry.out_features)
    match SPLITS.get(entry.module):
        case "outputs":
            return inputs, shard.part(entry.out_features)
        case "inputs":
            return shard.part(entry.in_features), outputs
        case None:
            return inputs, outputs


def _matrices(words: _Words, entry: ModuleEntry) -> tuple[_Words, _Words]:
    """A `[rank, in]` and Bᵀ `[rank, out]` of a module, as views."""
    first = entry.offset // words.itemsize
    middle = first + entry.rank * entry.in_features
    end = middle + entry.rank * entry.out_features
    return words[first:middle].reshape(entry.rank, -1), words[middle:end].reshape(entry.rank, -1)


def _chunks(
    whole: Iterable[LayerChunk], modules: Iterable[ModuleEntry], payload_bytes: int
) -> Iterable[LayerChunk]:
    """The ranges of the layers in the part's payload."""
    starts: dict[int, int] = {}
    for entry in modules:
        starts.setdefault(entry.layer, entry.offset)
    ends = [*list(starts.values())[1:], payload_bytes]
    for chunk, start, end in zip(whole, starts.values(), ends, strict=True):
        yield replace(chunk, offset=start, size_bytes=end - start)
