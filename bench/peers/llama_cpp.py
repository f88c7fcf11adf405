"""llama.cpp in a process of its own: `python -m bench.peers.llama_cpp SETTING`, in its environment.

The setting has `model` (a GGUF file), `max_requests` and `max_tokens` (of a request). A command has
`prompts` and `output_tokens`. There are no adapters: llama.cpp has one set of them per context, so
it cannot mix them in a batch. Calls its C interface directly, with numpy's argmax over the logits.
"""

import ctypes
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bench.peers.lines import Message, Timeline, serve


class _LlamaCpp:
    def __init__(self, setting: Message) -> None:
        self._numpy: Any = import_module("numpy")
        self._lib: Any = import_module("llama_cpp")
        lib = self._lib
        tokens_max = setting["max_requests"] * setting["max_tokens"]
        params = lib.llama_context_default_params()
        params.n_ctx = tokens_max
        params.n_batch = tokens_max
        params.n_seq_max = setting["max_requests"]
        params.n_outputs_max = setting["max_requests"]
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.kv_unified = setting.get("kv_unified", params.kv_unified)
        params.flash_attn_type = setting.get("flash_attn_type", params.flash_attn_type)
        params.n_ubatch = setting.get("n_ubatch", params.n_ubatch)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            setting["model"].encode(), lib.llama_model_default_params()
        )
        assert self._model, "the model was not loaded"
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, "there is no context"
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(tokens_max, 0, 1)

    def __call__(self, command: Message) -> Message:
        prompts = command["prompts"]
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        timeline = Timeline()
        token_ids = first_ids = self._decode(prompts, starts=[0] * len(prompts))
        timeline.step(firsts=len(prompts), tokens=len(prompts))
        for position in range(1, command["output_tokens"]):
            token_ids = self._decode(
                [[token_id] for token_id in token_ids],
                starts=[len(prompt) + position - 1 for prompt in prompts],
            )
            timeline.step(firsts=0, tokens=len(prompts))
        return timeline.answer(first_ids)

    def _decode(self, rows: Sequence[Sequence[int]], *, starts: Sequence[int]) -> list[int]:
        """Compute the next tokens of each sequence. Returns the most likely one after them."""
        batch = self._batch
        count = 0
        for sequence, (token_ids, start) in enumerate(zip(rows, starts, strict=True)):
            for offset, token_id in enumerate(token_ids):
                batch.token[count] = token_id
                batch.pos[count] = start + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = offset == len(token_ids) - 1
                count += 1
        batch.n_tokens = count
        assert self._lib.llama_decode(self._context, batch) == 0
        address = ctypes.cast(self._lib.llama_get_logits(self._context), ctypes.c_void_p).value
        shape = (len(rows), self._vocab_size)
        values = (ctypes.c_float * (shape[0] * shape[1])).from_address(address or 0)
        logits = self._numpy.frombuffer(values, self._numpy.float32).reshape(shape)
        return [int(token_id) for token_id in logits.argmax(-1)]


if __name__ == "__main__":
    serve(_LlamaCpp)
