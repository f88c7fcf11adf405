"""LoRA: adapters in device memory and their share of every linear, mixed in one batch.

Called by the engine. An adapter costs its true ranks: no slots of a maximum rank, no padding.
"""
