"""Other engines that benchmarks compare with: where they are installed, and a process around each.

Everything but `environments` and `gguf_model` runs in a peer's own environment, too, where this
project's dependencies are absent: those modules import the standard library and that peer only.
"""
