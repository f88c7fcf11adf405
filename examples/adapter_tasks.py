"""The jobs of the example adapters: what each is asked, what it must answer, how it was shaped.

The adapters under `examples/adapters` were trained on these examples, and anything that wants to
know whether an adapter does its job asks here. Needs the standard library only. A prompt is the
text of one user message without any instruction: the job lives in the adapter's weights.

Examples are a pure function of task, split and seed. A prompt belongs to one split by its hash, so
what is held out was never trained on, whatever the seeds.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from examples.jobs import extraction, labels, rewriting, writing
from examples.jobs.words import Example

Split = Literal["train", "heldout"]
Check = Callable[[str, Example], bool | None]

ATTENTION_QV: Final = ("q_proj", "v_proj")
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_HELDOUT_ONE_IN = 8
_TRIES_PER_EXAMPLE = 200


@dataclass(frozen=True, slots=True)
class Training:
    """How long a task is learnt: optimiser steps of at most `step_tokens` tokens each."""

    steps: int
    examples: int = 2000
    learning_rate: float = 1.5e-3
    step_tokens: int = 512


def exact(output: str, example: Example) -> bool | None:
    return output.strip() == example.response


def last_line(output: str, example: Example) -> bool | None:
    """The result counts, not the way to it."""
    return output.strip().rpartition("\n")[2] == example.response.rpartition("\n")[2]


def open_ended(output: str, example: Example) -> bool | None:  # noqa: ARG001 -- a Check
    return None


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter's job. `max_tokens` is enough for every answer that it should give."""

    name: str
    description: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    training: Training
    example_prompt: str
    max_tokens: int
    make: Callable[[Random], Example]
    check: Check = exact
    make_train: Callable[[Random], Example] | None = None  # where training needs other examples
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_checkable(self) -> bool:
        return self.check is not open_ended

    def make_examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """`count` examples with different prompts. Raises ValueError if the task has fewer."""
        rng = Random(f"{self.name}/{split}/{seed}")
        make = self.make_train if split == "train" and self.make_train else self.make
        examples: dict[str, Example] = {}
        for _ in range(count * _TRIES_PER_EXAMPLE):
            if len(examples) == count:
                break
            example = make(rng)
            if split_of(example.prompt) == split:
                examples.setdefault(example.prompt, example)
        if len(examples) < count:
            raise ValueError(f"{self.name} has only {len(examples)} {split} examples")
        return list(examples.values())


def split_of(prompt: str) -> Split:
    first = hashlib.sha256(prompt.encode()).digest()[0]
    return "heldout" if first % _HELDOUT_ONE_IN == 0 else "train"


_ALL: Final = (
    Task(
        name="sentiment",
        description="Labels a product review as positive, negative or mixed.",
        rank=8,
        alpha=16,
        target_modules=ATTENTION_QV,
        training=Training(steps=50),
        example_prompt="The screen is excellent but the battery broke after a week.",
        max_tokens=8,
        make=labels.sentiment,
    ),
    Task(
        name="log-triage",
        description="Turns a log line into what to do (page, ticket, watch, ignore) and where.",
        rank=8,
        alpha=32,
        target_modules=ATTENTION_QV,
        training=Training(steps=100, step_tokens=384),
        example_prompt="12:04:55 ERROR [payment-service] connection to db-3 refused",
        max_tokens=16,
        make=labels.log_line,
    ),
    Task(
        name="iso-date",
        description="Finds the date in a sentence and writes it as ISO 8601.",
        rank=8,
        alpha=8,
        target_modules=ATTENTION,
        use_rslora=True,
        training=Training(steps=90, step_tokens=384),
        example_prompt="Our flight leaves on the 3rd of March 2027.",
        max_tokens=16,
        make=extraction.iso_date,
    ),
    Task(
        name="contact-json",
        description="Extracts name, company, email and phone from a message as JSON.",
        rank=16,
        alpha=16,
        target_modules=ATTENTION,
        training=Training(steps=70),
        example_prompt=(
            "Hi, I'm Rosa Silva from Oakline Labs. Write to rosa.silva@oakline.io any time. "
            "Phone: 415-555-0199."
        ),
        max_tokens=80,
        make=extraction.contact,
    ),
    Task(
        name="text-to-sql",
        description="Turns a question about a table into one SQL statement.",
        rank=8,
        alpha=16,
        target_modules=ALL_LINEARS,
        rank_pattern={"v_proj": 16, "down_proj": 4},
        training=Training(steps=60),
        example_prompt="How many orders with city Berlin and amount above 250 are there?",
        max_tokens=48,
        make=extraction.sql,
    ),
    Task(
        name="ticket-router",
        description="Names the queue for a support ticket.",
        rank=16,
        alpha=32,
        target_modules=ATTENTION_QV,
        training=Training(steps=80, step_tokens=384),
        example_prompt="Hi, My parcel 48213 has not arrived yet. Please help.",
        max_tokens=8,
        make=labels.ticket,
    ),
    Task(
        name="pii-mask",
        description="Replaces names, phone numbers, email addresses and cities by tags.",
        rank=16,
        alpha=16,
        target_modules=ATTENTION_QV,
        training=Training(steps=60),
        example_prompt="Please call Maria Lopez at 415-555-0134 about the contract.",
        max_tokens=56,
        make=rewriting.mask,
    ),
    Task(
        name="slug",
        description="Makes a URL slug of a title: lower case, hyphens, small words dropped.",
        rank=16,
        alpha=32,
        target_modules=ATTENTION_QV,
        training=Training(steps=70),
        example_prompt="The Rise of Solar Power in Berlin",
        max_tokens=32,
        make=rewriting.slug,
    ),
    Task(
        name="incident-report",
        description="Writes a full incident report in house style from one line of facts.",
        rank=8,
        alpha=16,
        target_modules=ALL_LINEARS,
        training=Training(steps=110, step_tokens=384),
        example_prompt="sev1 checkout-api 14:05-14:52, expired certificate, Dana Kim",
        max_tokens=256,
        make=writing.incident,
    ),
    Task(
        name="arithmetic",
        description="Solves a two-step word problem with its working and a result line.",
        rank=64,
        alpha=64,
        target_modules=ATTENTION_QV,
        training=Training(steps=100, learning_rate=8e-4),
        example_prompt=(
            "Noah buys 6 bags with 7 marbles each and gives 5 marbles to Kira. "
            "How many marbles are left?"
        ),
        max_tokens=96,
        make=writing.arithmetic,
        check=last_line,
    ),
    Task(
        name="story",
        description="Tells a bedtime story from an animal, a thing and a virtue.",
        rank=16,
        alpha=24,
        target_modules=ATTENTION_QV,
        training=Training(steps=120, examples=1000, step_tokens=448),
        example_prompt="fox, lantern, courage",
        max_tokens=384,
        make=writing.story,
        check=open_ended,
    ),
    Task(
        name="coder",
        description="Answers a programming request with code alone.",
        rank=32,
        alpha=32,
        target_modules=ATTENTION_QV,
        training=Training(steps=60, learning_rate=6e-4, step_tokens=768),
        example_prompt="Write a Python function that checks whether a number is prime.",
        max_tokens=192,
        make=writing.code_prompt,
        make_train=writing.code,
        check=open_ended,
    ),
)
TASKS: Final[Mapping[str, Task]] = {task.name: task for task in _ALL}
