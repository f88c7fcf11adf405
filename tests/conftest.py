"""Settings of the whole test session."""

import os

# Waiting OpenMP threads sleep soon: tests run beside processes that want the same cores, and
# threads that spin take seconds per forward pass then. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100")
