"""Train the example adapters: `python -m examples.train_adapters [--only NAME] [--force]`.

Owns everything under `examples/adapters`. Each adapter is trained on examples from
`examples.adapter_tasks`, saved as PEFT files in bf16, then read back and judged on held-out prompts
beside the base model. An adapter that is there already is kept, so an interrupted run goes on.

Examples are packed: the chat template's system prompt is computed once per step, and every example
after it sees that prefix and itself only. That is the same loss as one example per row, without
padding and without repeating the prefix, which on a CPU halves the time.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.adapter_report import Score, write_reports
from examples.adapter_tasks import TASKS, Task
from examples.jobs.words import Example
from services.common.base_model import DEFAULT_MODEL, locate

ADAPTERS: Final = Path(__file__).parent / "adapters"
HELDOUT_SEED: Final = 1
_WARMUP_STEPS = 8
_GRADIENT_NORM_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example: what follows the system prompt, and how much of it is the response."""

    ids: list[int]
    response_tokens: int


@dataclass(frozen=True, slots=True)
class Pack:
    """One step: the shared prefix and some examples in one row of `[1, tokens]`."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor  # additive, [1, 1, tokens, tokens]
    predicting: torch.Tensor  # rows whose next token is part of a response
    targets: torch.Tensor


def main() -> None:
    options = _parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(locate(DEFAULT_MODEL))
    tasks = [TASKS[name] for name in options.only or TASKS]
    for task in tasks:
        folder = ADAPTERS / task.name
        missing = not (folder / "adapter_model.safetensors").is_file()
        if missing or options.force:
            train(task, tokenizer, folder)
        if missing or options.force or options.evaluate:
            score = evaluate(task, tokenizer, folder, count=options.heldout)
            write_reports(ADAPTERS, score)
            print(score, flush=True)


def train(task: Task, tokenizer: Any, folder: Path) -> None:
    """Learn the task and replace `folder` by the adapter."""
    torch.manual_seed(0)
    started = time.monotonic()
    model = get_peft_model(_load_base(), _lora_config(task))
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = task.training
    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate_curve(training.steps))
    model.train()
    packs = _packs(task, tokenizer)
    for step in range(1, training.steps + 1):
        loss = _loss(model, next(packs))
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM_MAX)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        if step % 10 == 0 or step == training.steps:
            took_s = time.monotonic() - started
            print(
                f"{task.name} {step}/{training.steps} {loss.item():.4f} {took_s:.0f}s", flush=True
            )
    _save(model, folder)


def evaluate(task: Task, tokenizer: Any, folder: Path, *, count: int) -> Score:
    """Greedy answers of adapter and base to the same held-out prompts."""
    model = PeftModel.from_pretrained(_load_base(), folder).eval()
    examples = task.make_examples("heldout", count if task.is_checkable else 8, HELDOUT_SEED)
    outputs = _answers(model, tokenizer, examples, max_tokens=task.max_tokens)
    for example, output in zip(examples, outputs, strict=True):
        if task.check(output, example) is False:
            print(f"miss: {example.prompt!r} -> {output!r}", flush=True)
    base_outputs: list[str] = []
    if task.is_checkable:
        # Past the longest right answer, what the base model goes on to say is wrong anyway.
        longest = max(len(tokenizer.encode(example.response)) for example in examples)
        with model.disable_adapter():
            base_outputs = _answers(model, tokenizer, examples, max_tokens=longest + 4)
    return Score(
        name=task.name,
        count=len(examples),
        adapter=_share_right(task, outputs, examples),
        base=_share_right(task, base_outputs, examples),
        output_tokens=len(tokenizer.encode(outputs[0], add_special_tokens=False)),
        sample_prompt=examples[0].prompt,
        sample_output=outputs[0],
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("--only", action="append", choices=sorted(TASKS), metavar="NAME")
    parser.add_argument("--force", action="store_true", help="train adapters that are there, too")
    parser.add_argument("--evaluate", action="store_true", help="judge adapters that are there")
    parser.add_argument("--heldout", type=int, default=64, help="prompts per checkable task")
    return parser.parse_args()


def _load_base() -> Any:
    # bf16 halves the time of a step on CPUs that have it; PEFT keeps its own weights in fp32.
    return AutoModelForCausalLM.from_pretrained(locate(DEFAULT_MODEL), dtype=torch.bfloat16)


def _lora_config(task: Task) -> LoraConfig:
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        target_modules=list(task.target_modules),
        rank_pattern=dict(task.rank_pattern),
        use_rslora=task.use_rslora,
        task_type="CAUSAL_LM",
    )


def _rate_curve(steps: int) -> Any:
    """Short linear warm-up, then half a cosine to zero."""

    def rate(step: int) -> float:
        if step < _WARMUP_STEPS:
            return (step + 1) / _WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * (step - _WARMUP_STEPS) / (steps - _WARMUP_STEPS)))

    return rate


def _loss(model: Any, pack: Pack) -> torch.Tensor:
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(
        input_ids=pack.ids,
        attention_mask=pack.mask,
        position_ids=pack.positions,
        use_cache=False,
    ).last_hidden_state
    # Only rows that predict a response go through the 49,152-wide output layer.
    logits = causal_lm.lm_head(hidden[0, pack.predicting])
    return cross_entropy(logits.float(), pack.targets)


def _packs(task: Task, tokenizer: Any) -> Iterator[Pack]:
    """Endless packs, in a new order each time round."""
    pool = task.make_examples("train", task.training.examples, seed=0)
    prefix, tokens = _tokenise(pool, tokenizer)
    rng = random.Random(task.name)
    chosen: list[Tokens] = []
    total = len(prefix)
    while True:
        rng.shuffle(tokens)
        for item in tokens:
            if chosen and total + len(item.ids) > task.training.step_tokens:
                yield _pack(prefix, chosen)
                chosen, total = [], len(prefix)
            chosen.append(item)
            total += len(item.ids)


def _tokenise(pool: list[Example], tokenizer: Any) -> tuple[list[int], list[Tokens]]:
    """The prefix that all prompts share, and what follows it for each."""
    prompts = [_prompt_ids(example, tokenizer) for example in pool]
    shared = 0
    while len({ids[shared] for ids in prompts}) == 1:
        shared += 1
    tokens: list[Tokens] = []
    for example, ids in zip(pool, prompts, strict=True):
        response = tokenizer.encode(example.response, add_special_tokens=False)
        response.append(tokenizer.eos_token_id)
        tokens.append(Tokens(ids[shared:] + response, len(response)))
    return prompts[0][:shared], tokens


def _prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _pack(prefix: list[int], chosen: list[Tokens]) -> Pack:
    ids, positions, owner = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    predicting: list[int] = []
    targets: list[int] = []
    for number, item in enumerate(chosen, start=1):
        ids += item.ids
        positions += range(len(prefix), len(prefix) + len(item.ids))
        owner += [number] * len(item.ids)
        predicting += range(len(ids) - item.response_tokens - 1, len(ids) - 1)
        targets += item.ids[-item.response_tokens :]
    owners = torch.tensor(owner)
    visible = (owners[None, :] == owners[:, None]) | (owners[None, :] == 0)
    mask = torch.zeros(visible.shape, dtype=torch.bfloat16)
    mask.masked_fill_(~visible.tril(), torch.finfo(torch.bfloat16).min)
    return Pack(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        mask=mask[None, None],
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
    )


def _save(model: Any, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    config_file = partial / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"].sort()  # PEFT writes a set, in an order that changes
    config["base_model_name_or_path"] = DEFAULT_MODEL  # not where it lies on this machine
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    (partial / "adapter_model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _answers(model: Any, tokenizer: Any, examples: list[Example], *, max_tokens: int) -> list[str]:
    """Greedy answers, all prompts in one left-padded batch."""
    rows = [_prompt_ids(example, tokenizer) for example in examples]
    width = max(map(len, rows))
    pad = tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    answers: list[str] = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return answers


def _share_right(task: Task, outputs: list[str], examples: list[Example]) -> float | None:
    if not task.is_checkable:
        return None
    right = sum(bool(task.check(o, e)) for o, e in zip(outputs, examples, strict=True))
    return right / len(examples)


if __name__ == "__main__":
    main()
