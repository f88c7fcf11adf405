"""The command line `calumma`: starts the suite on one machine, and speaks to any suite over gRPC.

Owns what a person or a script at a terminal sees. It imports no service; `calumma up` starts them
as processes. Nobody imports it.
"""

import os

# gRPC's core writes to stderr on its own, for example when a server goes away. It reads this once,
# when it is imported first.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
