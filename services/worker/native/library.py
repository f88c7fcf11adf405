"""The native step's library as Python objects: what `step.h` declares, and who owns what.

Memory is passed as addresses; who calls keeps it alive for as long as `step.h` says. A model and
its adapters are freed when the last reference to them goes. Calls release the interpreter's lock
for as long as they compute.
"""

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from services.worker.native.build import library_path

ABI: Final = 1


class NativeError(Exception):
    """A call of the library failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There is no native step here. `reason`: a clause, for logs."""

    reason: str


class Linear(IntEnum):
    """The linears of a layer, and the head."""

    QKV = 0
    O = 1  # noqa: E741  (the projection's usual name)
    GATE_UP = 2
    DOWN = 3
    HEAD = 4


class Norm(IntEnum):
    """Those of a layer, that behind the last one, and those over heads of q and k."""

    INPUT = 0
    FFN = 1
    FINAL = 2
    Q = 3
    K = 4


class Module(IntEnum):
    """What an adapter may target. Names are those of containers, in capitals."""

    Q_PROJ = 0
    K_PROJ = 1
    V_PROJ = 2
    O_PROJ = 3
    GATE_PROJ = 4
    UP_PROJ = 5
    DOWN_PROJ = 6
    EMBED_TOKENS = 7
    LM_HEAD = 8


class ModelShape(ctypes.Structure):
    """`calumma_config`."""

    _fields_ = (
        ("abi", c_int32),
        ("layers", c_int32),
        ("hidden", c_int32),
        ("ffn", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocab", c_int32),
        ("block_tokens", c_int32),
        ("max_positions", c_int32),
        ("threads", c_int32),
        ("norm_eps", c_float),
    )


class SegmentRows(ctypes.Structure):
    """`calumma_segment`."""

    _fields_ = (
        ("start", c_int32),
        ("rows", c_int32),
        ("blocks", c_void_p),
        ("adapter", c_void_p),
    )


class PassRows(ctypes.Structure):
    """`calumma_pass`."""

    _fields_ = (
        ("rows", c_int32),
        ("segments", c_int32),
        ("token_ids", c_void_p),
        ("segment", c_void_p),
        ("first_layer", c_int32),
        ("until_layer", c_int32),
        ("hidden", c_void_p),
        ("wanted", c_int32),
        ("wanted_rows", c_void_p),
    )


class ScoreRows(ctypes.Structure):
    """`calumma_scores`."""

    _fields_ = (("best", c_void_p), ("best_score", c_void_p), ("logits", c_void_p))


_SIGNATURES: Final[dict[str, tuple[type | None, list[type]]]] = {
    "calumma_isa": (c_char_p, []),
    "calumma_error": (c_char_p, []),
    "calumma_open": (c_void_p, [POINTER(ModelShape)]),
    "calumma_close": (None, [c_void_p]),
    "calumma_set_linear": (
        c_int32,
        [c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int32, c_void_p],
    ),
    "calumma_set_norm": (c_int32, [c_void_p, c_int32, c_int32, c_void_p, c_int32]),
    "calumma_set_embedding": (c_int32, [c_void_p, c_void_p]),
    "calumma_set_rotation": (c_int32, [c_void_p, c_void_p, c_void_p]),
    "calumma_set_rotates": (c_int32, [c_void_p, c_int32, c_int32]),
    "calumma_set_cache": (c_int32, [c_void_p, c_void_p, c_int32]),
    "calumma_clear_blocks": (None, [c_void_p, c_void_p, c_int32]),
    "calumma_adapter_open": (c_void_p, [c_void_p]),
    "calumma_adapter_set": (
        c_int32,
        [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_float],
    ),
    "calumma_adapter_close": (None, [c_void_p]),
    "calumma_run": (c_int32, [c_void_p, POINTER(PassRows), c_int32, POINTER(ScoreRows)]),
}


class Library:
    """A library that is loaded. `isa`: the instruction set that it uses, as a word."""

    def __init__(self, path: Path) -> None:
        """Raises OSError for a file that is not a library, NativeError for one that can't serve."""
        self._calls = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                call = getattr(self._calls, name)
            except AttributeError as error:
                raise NativeError(f"{path.name} has no {name}") from error
            call.restype = result
            call.argtypes = arguments
        isa: bytes | None = self._calls.calumma_isa()
        if isa is None:
            raise NativeError("this CPU lacks the instructions that it needs (AVX512 with BF16)")
        self.isa = isa.decode()

    @property
    def calls(self) -> ctypes.CDLL:
        """The functions of `step.h`."""
        return self._calls

    def error(self) -> NativeError:
        """Why the last failing call of this thread failed."""
        message: bytes | None = self._calls.calumma_error()
        return NativeError((message or b"no reason given").decode())

    def check(self, status: int) -> None:
        """Raises NativeError unless a call returned 0."""
        if status != 0:
            raise self.error()


class NativeModel:
    """A `calumma_model`. Addresses are those of contiguous memory, as `step.h` says."""

    def __init__(self, library: Library, shape: ModelShape) -> None:
        """Raises NativeError for shapes that are not supported, and for want of memory."""
        self._library = library
        self._calls = library.calls
        shape.abi = ABI
        handle: int | None = self._calls.calumma_open(ctypes.byref(shape))
        if handle is None:
            raise library.error()
        self._handle = handle
        weakref.finalize(self, self._calls.calumma_close, handle).atexit = False

    def set_linear(
        self, at: tuple[int, Linear], weight: int, shape: tuple[int, int], *, bias: int | None
    ) -> None:
        """`at`: layer and linear. `weight` bf16 of `shape` (out, in), `bias` fp32; both copied."""
        self._library.check(self._calls.calumma_set_linear(self._handle, *at, weight, *shape, bias))

    def set_norm(self, at: tuple[int, Norm], weight: int, size: int) -> None:
        """`weight` fp32, copied."""
        self._library.check(self._calls.calumma_set_norm(self._handle, *at, weight, size))

    def set_embedding(self, weight: int) -> None:
        """`weight` bf16 `[vocab, hidden]`; kept."""
        self._library.check(self._calls.calumma_set_embedding(self._handle, weight))

    def set_rotation(self, cos: int, sin: int) -> None:
        """Both fp32 `[positions, head_dim / 2]`, copied."""
        self._library.check(self._calls.calumma_set_rotation(self._handle, cos, sin))

    def set_rotates(self, layer: int, *, rotates: bool) -> None:
        self._library.check(self._calls.calumma_set_rotates(self._handle, layer, int(rotates)))

    def set_cache(self, memory: int, blocks: int) -> None:
        """`memory`: zeros, kept."""
        self._library.check(self._calls.calumma_set_cache(self._handle, memory, blocks))

    def clear_blocks(self, blocks: int, count: int) -> None:
        """`blocks`: int32 ids."""
        self._calls.calumma_clear_blocks(self._handle, blocks, count)

    def open_adapter(self) -> "NativeAdapter":
        """Raises NativeError."""
        return NativeAdapter(self, self._library, self._handle)

    def run(self, passes: Sequence[PassRows], scores: ScoreRows | None) -> None:
        """Raises NativeError. Other threads of Python run meanwhile."""
        array = (PassRows * len(passes))(*passes)
        scores_at = None if scores is None else ctypes.byref(scores)
        self._library.check(self._calls.calumma_run(self._handle, array, len(passes), scores_at))


class NativeAdapter:
    """A `calumma_adapter`. It keeps its model alive."""

    def __init__(self, model: NativeModel, library: Library, model_handle: int) -> None:
        self._model = model
        self._library = library
        handle: int | None = library.calls.calumma_adapter_open(model_handle)
        if handle is None:
            raise library.error()
        self.handle = handle
        weakref.finalize(self, library.calls.calumma_adapter_close, handle).atexit = False

    def set_pair(
        self, at: tuple[int, Module], rank: int, rows: tuple[int, int], *, scale: float
    ) -> None:
        """`at`: layer and module. `rows`: bf16 A `[rank, in]` and Bᵀ `[rank, out]`, kept."""
        self._library.check(
            self._library.calls.calumma_adapter_set(self.handle, *at, rank, *rows, scale)
        )


def load() -> Library | Unavailable:
    """The library of these sources, if it is built and can be used on this machine."""
    path = library_path()
    if not path.is_file():
        return Unavailable("its library is not built; `make native` does that")
    try:
        return Library(path)
    except (OSError, NativeError) as error:
        return Unavailable(str(error))
