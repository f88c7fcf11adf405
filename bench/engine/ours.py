"""Our engine in a process of its own: `python -m bench.engine.ours SETTING`.

The setting has `model`, `tier` and `adapters` (PEFT folders). A command has a `kind`:
  `batch`: `prompts`, `adapters` (an index or null for each) and `output_tokens`; all at once;
  `waves`: the same, with at most `in_flight` requests at once, the next when one ends;
  `load`, `unload`: all adapters come or go; they are there at first;
  `describe`: what computes.
This is the engine as a worker has it: sequences are opened with blocks of the one pool, and every
token comes from a call of `step`.
"""

import mmap
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers.lines import Message, Timeline, serve
from services.adapter_store.peft import BaseModel, convert
from services.common.base_model import load_config
from services.worker.engine import (
    Engine,
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
    build_engine,
)

_RANK_MAX: Final = 256
_MAX_SEQUENCES: Final = 32


@dataclass(slots=True)
class _Running:
    """An open sequence: how many tokens it has room for, and how many it gets and got."""

    name: str
    index: int
    next_tokens: int  # of its next step
    known_tokens: int
    room_tokens: int = 0
    drawn: int = 0


class _Blocks:
    """Block ids of the pool: given out one after the other, taken back all at once."""

    def __init__(self, engine: Engine) -> None:
        self._count = engine.info.pool_blocks
        self._block_tokens = engine.info.block_tokens
        self._free = deque(range(self._count))
        self._taken: dict[str, list[int]] = {}

    def take(self, running: _Running) -> tuple[int, ...]:
        """Those that it needs for its next step."""
        missing = running.known_tokens - running.room_tokens
        blocks = tuple(self._free.popleft() for _ in range(-(-missing // self._block_tokens)))
        running.room_tokens += len(blocks) * self._block_tokens
        self._taken.setdefault(running.name, []).extend(blocks)
        return blocks

    def give_back(self, running: _Running) -> None:
        self._free.extend(self._taken.pop(running.name))


class _Ours:
    def __init__(self, setting: Message) -> None:
        folder = Path(setting["model"])
        base = BaseModel(load_config(folder), ())
        self._adapters = [_converted(Path(path), base) for path in setting["adapters"]]
        self._engine = build_engine(
            EngineSettings(
                model=folder,
                max_sequences=_MAX_SEQUENCES,
                threads=os.cpu_count(),
                tier=setting["tier"],
            )
        )
        self._blocks = _Blocks(self._engine)
        self._opened = 0
        self._load()

    def __call__(self, command: Message) -> Message:
        match command["kind"]:
            case "batch":
                return self._run(command, in_flight=len(command["prompts"]))
            case "waves":
                return self._run(command, in_flight=command["in_flight"])
            case "load":
                self._load()
            case "unload":
                for digest, _ in self._adapters:
                    self._engine.remove_adapter(digest)
            case "describe":
                return {"description": self._engine.info.description}
            case kind:
                raise ValueError(f"no command {kind!r}")
        return {}

    def _load(self) -> None:
        for digest, blob in self._adapters:
            add_adapter(self._engine, digest, _in_pages(blob))

    def _run(self, command: Message, *, in_flight: int) -> Message:
        waiting = deque(enumerate(zip(command["prompts"], command["adapters"], strict=True)))
        output_tokens = command["output_tokens"]
        first_ids = [0] * len(waiting)
        running: dict[str, _Running] = {}
        timeline = Timeline()
        while waiting or running:
            while waiting and len(running) < in_flight:
                index, (prompt, adapter) = waiting.popleft()
                opened = self._open(index, prompt, adapter, output_tokens=output_tokens)
                running[opened.name] = opened
            tokens, firsts = self._step(running, first_ids)
            timeline.step(firsts=firsts, tokens=tokens)
            for one in [one for one in running.values() if one.drawn == output_tokens]:
                self._engine.close_sequence(one.name)
                self._blocks.give_back(running.pop(one.name))
        return timeline.answer(first_ids)

    def _open(
        self, index: int, prompt: Sequence[int], adapter: int | None, *, output_tokens: int
    ) -> _Running:
        self._opened += 1
        name = f"{self._opened}"
        digest = None if adapter is None else self._adapters[adapter][0]
        self._engine.open_sequence(
            SequenceSpec(name, tuple(prompt), len(prompt), digest, Sampling(), output_tokens)
        )
        return _Running(name, index, len(prompt), len(prompt))

    def _step(self, running: dict[str, _Running], first_ids: list[int]) -> tuple[int, int]:
        """One step of all. Returns how many tokens were drawn and how many were first ones."""
        items = [
            StepItem(one.name, one.next_tokens, new_blocks=self._blocks.take(one))
            for one in running.values()
        ]
        firsts = 0
        drawn = self._engine.step(items)
        for token in drawn:
            assert isinstance(token, SampledToken), token
            one = running[token.sequence_id]
            if one.drawn == 0:
                first_ids[one.index] = token.token_id
                firsts += 1
            one.drawn += 1
            one.known_tokens += 1
            one.next_tokens = 1
        return len(drawn), firsts


def _in_pages(blob: bytes) -> memoryview:
    """Memory of its own at the start of a page, as a worker has for adapters."""
    memory = mmap.mmap(-1, len(blob))
    memory[:] = blob
    return memoryview(memory)


def _converted(folder: Path, base: BaseModel) -> tuple[str, bytes]:
    """Digest and bytes of an adapter's blob, as the adapter store makes it."""
    config = (folder / "adapter_config.json").read_bytes()
    data = memoryview((folder / "adapter_model.safetensors").read_bytes())
    converted = convert(config, data, base, rank_max=_RANK_MAX)
    return converted.weights.digest, bytes(converted.blob)


if __name__ == "__main__":
    serve(_Ours)
