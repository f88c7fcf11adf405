"""transformers + PEFT in a process of its own: `python -m bench.peers.peft SETTING`.

The setting has `model` and `adapters` (folders). A command has `prompts`, `adapters` (an index or
null for each) and `output_tokens`; a batch with adapters runs as one, with `adapter_names`.
"""

from typing import Any

from bench.peers.lines import Message, Timeline, serve


class _Peft:
    def __init__(self, setting: Message) -> None:
        import peft
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch = torch
        base = transformers.AutoModelForCausalLM.from_pretrained(
            setting["model"], dtype=torch.bfloat16
        )
        folders = setting["adapters"]
        self._model = peft.PeftModel.from_pretrained(base, folders[0], "a0")
        for index, folder in enumerate(folders[1:], start=1):
            self._model.load_adapter(folder, f"a{index}")
        self._model.eval().to(torch.bfloat16)

    def __call__(self, command: Message) -> Message:
        inputs = self._torch.tensor(command["prompts"])
        options: dict[str, Any] = {
            "input_ids": inputs,
            "attention_mask": self._torch.ones_like(inputs),
            "max_new_tokens": command["output_tokens"],
            "min_new_tokens": command["output_tokens"],
            "do_sample": False,
            "pad_token_id": 0,
        }
        watch = _Watch(Timeline(), rows=len(command["prompts"]))
        with self._torch.inference_mode():
            if all(adapter is None for adapter in command["adapters"]):
                with self._model.disable_adapter():
                    found = self._model.generate(**options, logits_processor=[watch])
            else:
                names = ["__base__" if i is None else f"a{i}" for i in command["adapters"]]
                found = self._model.generate(
                    **options, logits_processor=[watch], adapter_names=names
                )
        return watch.timeline.answer(found[:, inputs.shape[1]].tolist())


class _Watch:
    """A logits processor that changes nothing and notes when the logits of each step are there."""

    def __init__(self, timeline: Timeline, *, rows: int) -> None:
        self.timeline = timeline
        self._rows = rows
        self._has_first = False

    def __call__(self, _input_ids: Any, scores: Any) -> Any:
        self.timeline.step(firsts=0 if self._has_first else self._rows, tokens=self._rows)
        self._has_first = True
        return scores


if __name__ == "__main__":
    serve(_Peft)
