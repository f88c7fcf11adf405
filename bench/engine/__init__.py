"""Our engine beside PEFT, llama.cpp and vLLM on the CPU: mixed adapters, base decoding, losses.

Every engine is a process of its own. An alternation asks each once, one right after the other, with
the rate at which memory is read measured around every answer, because on a shared host that flips
between two states; a figure is the median over alternations, a ratio the median of the ratios. 64
tokens in, 64 out, greedy, bf16. `through` (`python -m bench engine.through`) goes on to the suite.

"small": 32 requests with 16 adapters of ranks 8 to 64, and the base alone in batches of 1, 8, 32.
"smol", SmolLM2-135M, does not fit in the caches: how near to memory's rate it is decoded, and what
eight adapters of rank 16 leave of the base's throughput.
"""

from bench.engine.run import run

__all__ = ["run"]
