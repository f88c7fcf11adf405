"""`python -m services.cli.launch PARENT_PID MODULE …`: run a service that does not outlive `up`.

`up` normally ends its services itself. When it is killed so that it cannot, the kernel kills them:
Linux sends a process the signal that it asked for once the thread that started it is gone.
"""

import ctypes
import os
import runpy
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        # A C library without prctl costs this safety net and nothing else.
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before this was asked for
        sys.exit(1)


def main() -> None:
    """Become the service: its module sees its own flags only."""
    parent_pid, module, *flags = sys.argv[1:]
    _die_with_parent(int(parent_pid))
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
