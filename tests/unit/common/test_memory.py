import subprocess
import sys

import pytest

PIECE_BYTES = 2**20
_FAULTS = f"""
import resource
from services.common.memory import keep_freed_memory
{{call}}
def pass_through():
    for _ in range(64):
        held = [b"x" * {PIECE_BYTES} for _ in range(4)]
pass_through()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pass_through()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(call: str) -> int:
    """Of a process through whose memory 256 MiB pass, for the second time."""
    command = [sys.executable, "-c", _FAULTS.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_memory_that_is_freed_and_needed_again_costs_no_new_pages() -> None:
    assert _page_faults("keep_freed_memory()") < _page_faults("pass") / 10
