"""Pins host memory for a GPU's copies: once for a whole mapping, because each call takes long."""

from typing import Any, cast

import numpy as np
import structlog

_log = structlog.get_logger("pinning")


def pin(memory: memoryview) -> bool:
    """Page-lock the memory. Needs CUDA. False when it refuses: copies are slower then, and work."""
    import torch

    if not len(memory):
        return False
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    runtime: Any = cast("Any", torch.cuda).cudart()  # untyped in torch
    code = int(runtime.cudaHostRegister(address, len(memory), 0))
    if code:
        _log.warning("memory_not_pinned", bytes=len(memory), cuda_error=code)
    return code == 0
