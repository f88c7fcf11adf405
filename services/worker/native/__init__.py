"""The forward pass as compiled code for CPUs: a small C++ library behind `step.h`.

`build` compiles it, `library` loads and describes it to Python, `probe` asks whether what it
computes here is right. Nothing in this package but `probe` needs more than the standard library.
`services.worker.engine.native_executor` serves a model with it.
"""
