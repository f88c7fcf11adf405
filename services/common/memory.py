"""Has the allocator keep large pieces of memory that are freed, for those who need them next.

glibc gives large pieces back to the kernel when they are freed and gets new pages, filled with
zeros, when the next one is needed. For a process that passes megabytes through, from one buffer to
the next, that costs several times what copying the bytes does.
"""

import ctypes
from typing import Final

# From malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_PIECE_BYTES_MAX: Final = 32 * 2**20  # the largest that glibc allows; larger ones go back at once
_KEPT_BYTES_MAX: Final = 128 * 2**20  # at the end of the heap


def keep_freed_memory() -> None:
    """For the whole process, from now on. Nothing happens where the allocator is another one.

    What is kept is within what the process once used at the same time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # One heap for all threads: a piece that one has freed is the next one's, whoever needs it.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES_MAX)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES_MAX)
