"""Whether what an engine is to hold fits: contexts into the model's, weights into memory.

Said at start, in bytes and tokens, before anything is loaded: a process that runs out of memory in
the middle of it is killed without a word, or ends in another library's words.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.common.base_model import ContextTooLongError, ModelConfig
from services.common.model_tensors import expected_tensors

DEFAULT_CONTEXT_TOKENS: Final = 2048
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


class EngineMemoryError(ValueError):
    """There is less memory than needed; the message has both in bytes."""


def context_tokens(asked_tokens: int | None, config: ModelConfig) -> int:
    """The longest context of the engine: as asked, else the model's, but not more than the default.

    Raises ContextTooLongError for more than the model has, or than its sliding window: within it
    the model attends to everything, which is what is computed.
    """
    if asked_tokens is None:
        return min(DEFAULT_CONTEXT_TOKENS, config.context_tokens_max)
    if asked_tokens > config.context_tokens_max:
        window = f", its sliding window {config.sliding_window}" if config.sliding_window else ""
        raise ContextTooLongError(
            f"a context of {asked_tokens} tokens was asked for; the model's longest has "
            f"{config.max_positions}{window}"
        )
    return asked_tokens


def pool_blocks(memory_bytes: int, block_bytes: int) -> int:
    """How many blocks there are room for. Raises EngineMemoryError when that is none."""
    if memory_bytes < block_bytes:
        raise EngineMemoryError(
            f"the memory pool was given {memory_bytes} bytes; one block needs {block_bytes}"
        )
    return memory_bytes // block_bytes


def weights_bytes(config: ModelConfig, value_bytes: int) -> int:
    """Of all tensors, with so many bytes for each value."""
    return sum(math.prod(shape) * value_bytes for _, shape in expected_tensors(config))


def check_weights_fit(needed_bytes: int, available_bytes: int | None) -> None:
    """Raises EngineMemoryError. `available_bytes` None: nobody knows."""
    if available_bytes is not None and needed_bytes > available_bytes:
        raise EngineMemoryError(
            f"the model's weights need {needed_bytes} bytes of memory, {available_bytes} are there"
        )


def host_bytes_available() -> int | None:
    """What the system could give this process now; None where it does not say (only Linux does)."""
    known: list[int] = []
    with suppress(OSError, ValueError):
        known.append(int(_CGROUP_LIMIT.read_text(encoding="ascii")))  # or "max"
    with suppress(OSError):
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        known.extend(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    return min(known, default=None)
