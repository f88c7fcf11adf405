"""vLLM in a process of its own: `python -m bench.peers.vllm SETTING`, in vLLM's environment.

The setting has `model`, `adapters` (folders; none: LoRA is off), `rank_max`, `max_requests` and
`max_tokens` (of a request). Without adapters it compiles, with them it runs eagerly: that is the
faster way for each on a CPU. A command has `prompts`, `adapters` (an index or null for each) and
`output_tokens`. Steps are called one after the other in this process.
"""

from importlib import import_module
from typing import Any

from bench.peers.lines import Message, Timeline, serve


class _Vllm:
    def __init__(self, setting: Message) -> None:
        vllm: Any = import_module("vllm")
        request: Any = import_module("vllm.lora.request").LoRARequest
        adapters = setting["adapters"]
        lora: dict[str, Any] = {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_cpu_loras": len(adapters),
            "max_lora_rank": setting["rank_max"],
        }
        self._sampling = vllm.SamplingParams
        self._requests = [request(f"a{i}", i + 1, path) for i, path in enumerate(adapters)]
        self._engine: Any = vllm.LLM(
            model=setting["model"],
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=bool(adapters),
            enable_prefix_caching=False,
            max_num_seqs=setting["max_requests"],
            max_model_len=setting["max_tokens"],
            max_num_batched_tokens=setting["max_requests"] * setting["max_tokens"],
            **(lora if adapters else {}),
        ).llm_engine
        self._served = 0

    def __call__(self, command: Message) -> Message:
        sampling = self._sampling(
            temperature=0.0, max_tokens=command["output_tokens"], ignore_eos=True, detokenize=False
        )
        names = [f"{self._served + i}" for i in range(len(command["prompts"]))]
        self._served += len(names)
        timeline = Timeline()
        for name, prompt, adapter in zip(
            names, command["prompts"], command["adapters"], strict=True
        ):
            request = None if adapter is None else self._requests[adapter]
            self._engine.add_request(
                name, {"prompt_token_ids": prompt}, sampling, lora_request=request
            )
        lengths = dict.fromkeys(names, 0)
        first_ids: dict[str, int] = {}
        while self._engine.has_unfinished_requests():
            tokens = 0
            firsts = 0
            for output in self._engine.step():
                token_ids = output.outputs[0].token_ids  # all of the request's so far
                tokens += len(token_ids) - lengths[output.request_id]
                firsts += output.request_id not in first_ids
                first_ids.setdefault(output.request_id, int(token_ids[0]))
                lengths[output.request_id] = len(token_ids)
            timeline.step(firsts=firsts, tokens=tokens)
        return timeline.answer([first_ids[name] for name in names])


if __name__ == "__main__":
    serve(_Vllm)
