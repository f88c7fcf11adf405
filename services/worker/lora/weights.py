"""An adapter in device memory, which may still be arriving.

On the CPU, in the dtype of the engine, device memory is the payload itself: a load makes views and
touches no weight. Else each part is brought over when it has arrived: to the dtype, to the device,
on a stream of its own, so that neither a step nor its stream waits for it.

What the store published is finite and the digest proves the bits; only what a change of dtype made
of them is looked at.

Threads: `extend` is called by one at a time, and may run beside steps that read. `ready_layers` is
set last, and a step reads no pair of a layer that is not below it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from services.common.adapter_container import EMBEDDING_LAYER, ContainerHeader, ModuleEntry
from services.common.base_model import ModelConfig
from services.worker.engine.api import AdapterIncompatibleError
from services.worker.lora.layout import LoraPair, check_fits

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class AdapterWeights:
    """One adapter. `layers[layer]` has a pair for each adapted module, once the layer is ready."""

    def __init__(
        self,
        header: ContainerHeader,
        payload: memoryview,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        transfer: "Transfer | None" = None,
    ) -> None:
        """`transfer`: how to reach the device; None: it is the host. Reads no weight yet.

        Raises AdapterIncompatibleError.
        """
        check_fits(header, config)
        assert len(payload) == header.payload_bytes
        self.rank = header.rank
        self.layers: tuple[dict[str, LoraPair], ...] = tuple({} for _ in range(config.num_layers))
        self.embedding: LoraPair | None = None
        self.head: LoraPair | None = None
        self.ready_layers = 0
        self._dtype = dtype
        self._transfer = transfer
        self._rest = list(header.modules)  # entries that are to come, in the payload's order
        self._payload: Tensor | None = torch.frombuffer(payload, dtype=_DTYPES[header.dtype])

    def extend(self, layers: int) -> None:
        """Take the rows of the layers below; the head's, too, if these are all.

        Raises AdapterIncompatibleError for values that the engine's dtype cannot hold, and
        MemoryError where the device has no memory for them.
        """
        assert self.ready_layers < layers <= len(self.layers)
        is_last = layers == len(self.layers)
        entries = [entry for entry in self._rest if entry.layer < layers or is_last]
        self._rest = self._rest[len(entries) :]
        if entries:
            self._place(entries)
        if is_last:
            self._payload = None
        self.ready_layers = layers

    def _place(self, entries: Sequence[ModuleEntry]) -> None:
        """Make the pairs of entries that are one range of the payload."""
        assert self._payload is not None
        itemsize = self._payload.itemsize
        start = entries[0].offset // itemsize
        end = entries[-1].offset // itemsize + _numel(entries[-1])
        bring = self._transfer or _converted
        try:
            rows = bring(self._payload[start:end], self._dtype)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        first = rows.storage_offset() - start
        for entry in entries:
            at = first + entry.offset // itemsize
            a = rows.as_strided((entry.rank, entry.in_features), (entry.in_features, 1), at)
            at += a.numel()
            bt = rows.as_strided((entry.rank, entry.out_features), (entry.out_features, 1), at)
            self._keep(entry, LoraPair(a, bt, entry.scale))

    def _keep(self, entry: ModuleEntry, pair: LoraPair) -> None:
        if entry.layer == EMBEDDING_LAYER:
            self.embedding = pair
        elif entry.layer == len(self.layers):
            self.head = pair
        else:
            self.layers[entry.layer][entry.module] = pair


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in the dtype, themselves if they are. Raises AdapterIncompatibleError."""
    converted = rows.to(dtype)
    if rows.dtype != dtype and not bool(torch.isfinite(converted).all()):
        raise AdapterIncompatibleError(f"not all weights are finite as {dtype}")
    return converted


def _numel(entry: ModuleEntry) -> int:
    return entry.rank * (entry.in_features + entry.out_features)


class Transfer:
    """Copies host memory to a CUDA device, beside the steps that compute there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._computing = torch.cuda.current_stream(device)

    def __call__(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`rows` in device memory and in the dtype; waits for that, which no step does.

        Raises AdapterIncompatibleError.
        """
        with torch.cuda.stream(self._copying):
            brought = _converted(rows.to(self._device, non_blocking=True), dtype)
        # Steps read it: once dropped, its memory is taken again behind what they have queued.
        brought.record_stream(self._computing)
        self._copying.synchronize()
        return brought
