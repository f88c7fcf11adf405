"""Settings of the whole test session."""

import os
import signal
from pathlib import Path

# Waiting OpenMP threads sleep soon: tests run beside processes that want the same cores, and
# threads that spin take seconds per forward pass then. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100")

# Parallel test processes inherit a terminal's size (readline exports it), and rich reads it once.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# A shell that starts the tests in the background makes them, and all they start, deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a CUDA device the tests run kernels in Triton's interpreter. Read when Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
