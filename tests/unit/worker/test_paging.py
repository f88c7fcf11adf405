"""Bringing pages before they are needed."""

import mmap
import resource

import pytest

from services.worker.paging import bring_pages

SIZE_BYTES = 2**24
PAGES = SIZE_BYTES // mmap.PAGESIZE


def _mapping() -> memoryview:
    mapping = mmap.mmap(-1, SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)  # so that each page is a fault
    return memoryview(mapping)


def _faults_of_writing(view: memoryview) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for at in range(0, len(view), mmap.PAGESIZE):
        view[at] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_whose_pages_were_brought_is_written_without_faults() -> None:
    untouched, brought = _mapping(), _mapping()
    bring_pages(brought[100:-100])
    if _faults_of_writing(untouched) < PAGES // 2:
        pytest.skip("this kernel does not count faults")
    faults = _faults_of_writing(brought)
    if faults >= PAGES // 2:
        pytest.skip("this kernel can't bring pages")
    assert faults < PAGES // 16


def test_what_is_in_memory_stays() -> None:
    view = _mapping()
    view[5:10] = b"bytes"
    bring_pages(view)
    assert bytes(view[:16]) == bytes(5) + b"bytes" + bytes(6)


def test_no_memory_needs_no_pages() -> None:
    bring_pages(memoryview(bytearray()))
