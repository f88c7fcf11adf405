"""Has the kernel bring the pages of memory before somebody waits for them.

The first write to a page waits until the kernel has cleared it; for the memory of an adapter of
40 MB that is up to 0.1 s in all. It belongs on a thread that nobody waits for.
"""

import ctypes
from typing import Final

_PAGE_BYTES: Final = 4096
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_PIECE_BYTES: Final = 2**22  # so that other threads that need pages get their turn


def bring_pages(view: memoryview) -> None:
    """Bring all pages of writable memory. Its content stays, whoever writes to it meanwhile.

    Nothing happens where the kernel can't do it.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)  # a call of it lets other threads run
    if madvise is None or not view:
        return
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    end = start + view.nbytes
    start -= start % _PAGE_BYTES
    for at in range(start, end, _PIECE_BYTES):
        size_bytes = min(_PIECE_BYTES, end - at)
        if madvise(ctypes.c_void_p(at), ctypes.c_size_t(size_bytes), _POPULATE_WRITE) != 0:
            return
