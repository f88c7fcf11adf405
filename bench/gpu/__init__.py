"""`python -m bench gpu`: kernels and engine on one CUDA device, with random weights built there.

Needs torch, triton, numpy, safetensors and no network; nothing of the services but the engine.
"""

from bench.gpu.run import run

__all__ = ["run"]
