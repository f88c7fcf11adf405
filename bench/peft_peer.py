"""The peer of the spine benchmark: transformers + PEFT in a process of its own.

`python -m bench.peft_peer` reads one JSON command per line and answers each with one JSON line:
`{"mode": "by_adapter" | "mixed", "jobs": [[prompt, adapter, max_tokens], …]}`. All jobs count as
sent when the command is read. by_adapter runs one batch per adapter, one after the other, which
is how PEFT is used without `adapter_names`; mixed gives `adapter_names` and runs one batch.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.load import Job


@dataclass(frozen=True, slots=True)
class PeerResult:
    """Seconds to the first token of each job, and the whole run's time and tokens."""

    ttft_s: Sequence[float]
    wall_s: float
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the whole run."""
        return self.output_tokens / self.wall_s


class PeftPeer:
    """Starts the peer process and talks to it."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        setting = json.dumps(
            {"model": str(model), "adapters": {k: str(v) for k, v in adapters.items()}}
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.peft_peer", setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def run(self, mode: str, jobs: Sequence[Job]) -> PeerResult:
        """Run all jobs at once and wait."""
        assert self._process.stdin is not None
        command = {"mode": mode, "jobs": [[j.prompt, j.adapter, j.max_tokens] for j in jobs]}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return PeerResult(**self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print, too
                return cast("dict[str, Any]", json.loads(line))
        raise RuntimeError("the PEFT peer ended without an answer")


class _Generator:
    """The model with every adapter loaded, bf16 on the CPU."""

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        import peft
        import torch
        import transformers

        self._torch = torch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        names = list(adapters)
        self._model = peft.PeftModel.from_pretrained(base, adapters[names[0]], names[0])
        for name in names[1:]:
            self._model.load_adapter(adapters[name], name)
        self._model.eval().to(torch.bfloat16)

    def batch(self, jobs: Sequence[Job], *, mixed: bool, sent_s: float) -> float:
        """Generate exactly max_tokens for one batch. Returns seconds to its first token."""
        tokenizer = self._tokenizer
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": job.prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for job in jobs
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        watch = _FirstToken()
        options: dict[str, Any] = {
            "max_new_tokens": jobs[0].max_tokens,
            "min_new_tokens": jobs[0].max_tokens,
            "do_sample": False,
            "logits_processor": [watch],
        }
        if mixed:
            options["adapter_names"] = [job.adapter or "__base__" for job in jobs]
        with self._torch.inference_mode():
            if mixed or jobs[0].adapter:
                if not mixed:
                    self._model.set_adapter(jobs[0].adapter)
                self._model.generate(**inputs, **options)
            else:
                with self._model.disable_adapter():
                    self._model.generate(**inputs, **options)
        return watch.first_s - sent_s


class _FirstToken:
    """A logits processor that changes nothing and notes when the first logits are there."""

    first_s = 0.0

    def __call__(self, _input_ids: Any, scores: Any) -> Any:
        self.first_s = self.first_s or time.perf_counter()
        return scores


def _serve(setting: dict[str, Any]) -> None:
    generator = _Generator(setting["model"], setting["adapters"])
    print("{}", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        jobs = [Job(prompt, adapter, most) for prompt, adapter, most in command["jobs"]]
        print(json.dumps(_run(generator, command["mode"], jobs)), flush=True)


def _run(generator: _Generator, mode: str, jobs: Sequence[Job]) -> dict[str, Any]:
    sent_s = time.perf_counter()
    ttft_s: list[float] = []
    if mode == "mixed":
        ttft_s = [generator.batch(jobs, mixed=True, sent_s=sent_s)] * len(jobs)
    else:
        for name in dict.fromkeys(job.adapter for job in jobs):
            group = [job for job in jobs if job.adapter == name]
            ttft_s += [generator.batch(group, mixed=False, sent_s=sent_s)] * len(group)
    wall_s = time.perf_counter() - sent_s
    return {
        "ttft_s": ttft_s,
        "wall_s": wall_s,
        "output_tokens": sum(job.max_tokens for job in jobs),
    }


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
