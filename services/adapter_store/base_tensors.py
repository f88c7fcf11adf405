"""The base model's own embedding and output head, to hold what an adapter brings along against.

PEFT writes the base model's embedding and head into an adapter that targets one of them. They are
no part of the adapter when they are those of the served model, and make it another model when they
are not. Read when needed: a store whose model folder has no weights serves all other adapters.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.adapter_store.safetensors_file import HEADER_BYTES_MAX, Bits, float_values
from services.common.adapter_container import DTYPE_BYTES
from services.common.base_model import BaseModelError, ModelIncompleteError, weight_files

_LENGTH_BYTES: Final = 8
_COMPARED_ELEMENTS: Final = 2**20  # at a time, so that a large vocabulary takes no memory


class BaseTensors:
    """Single tensors of a base model's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has_values(self, name: str, bits: Bits, dtype: str) -> bool:
        """Whether tensor `name` of the base model has these values, in whatever dtype.

        Raises BaseModelError when the folder has no such tensor, and OSError.
        """
        own, own_dtype = self._read(name)
        if own.shape != bits.shape:
            return False
        ours, theirs = own.reshape(-1), bits.reshape(-1)
        for start in range(0, ours.size, _COMPARED_ELEMENTS):
            part = slice(start, start + _COMPARED_ELEMENTS)
            if not np.array_equal(
                float_values(ours[part], own_dtype), float_values(theirs[part], dtype)
            ):
                return False
        return True

    def _read(self, name: str) -> tuple[Bits, str]:
        for path in weight_files(self._folder):
            try:
                header, data_offset = _header(path)
                if name in header:
                    return _mapped(path, header[name], data_offset)
            except (KeyError, TypeError, ValueError) as error:
                raise ModelIncompleteError(f"{path} is not a safetensors file") from error
        raise ModelIncompleteError(f"{self._folder} has no tensor {name}")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries by tensor, and where the data begins. Raises ValueError."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if header_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"a header of {header_bytes} bytes")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    return header, _LENGTH_BYTES + header_bytes


def _mapped(path: Path, entry: dict[str, Any], data_offset: int) -> tuple[Bits, str]:
    """The tensor's elements, which are read when they are looked at, and its dtype."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPE_BYTES:
        raise BaseModelError(f"{path} has weights of dtype {dtype}")
    width: Any = np.uint32 if dtype == "F32" else np.uint16
    offset = data_offset + entry["data_offsets"][0]
    flat: npt.NDArray[Any] = np.memmap(
        path, dtype=width, mode="r", offset=offset, shape=(math.prod(shape),)
    )
    return flat.reshape(shape), dtype
