"""Alternations: every system once for each measure, over and over, and what the machine did."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from bench.engine.bandwidth import ReadBandwidth
from bench.engine.measures import Measure, Sample
from bench.engine.models import Subject
from bench.engine.systems import System
from bench.peers.lines import Child, PeerError

_ANSWER_S_MAX: Final = 120.0
_WARM_UP_TOKENS: Final = 3
_STARTING_MAX: Final = 2  # they import and read, on one core each
_SETTLE_S: Final = 0.3  # threads of the one that was just measured spin for up to 0.2 s


@dataclass(slots=True)
class Running:
    """Systems that were started for one model. `absent`: why others are not among them."""

    subject: Subject
    systems: Sequence[System]
    children: dict[str, Child] = field(default_factory=dict[str, Child])
    absent: dict[str, str] = field(default_factory=dict[str, str])
    samples: list[Sample] = field(default_factory=list[Sample])

    def start(self, stack: ExitStack) -> None:
        """Start all that can be, two at once; `stack` ends them."""
        with ThreadPoolExecutor(_STARTING_MAX) as starting:
            started = [starting.submit(system.start, self.subject) for system in self.systems]
        for system, future in zip(self.systems, started, strict=True):
            try:
                child = future.result()
            except PeerError as error:
                self._leave_out(system.name, error)
            else:
                stack.callback(child.close)
                self.children[system.name] = child
                print(f"{self.subject.name}: {system.name} is ready", flush=True)

    def warm_up(self, measures: Sequence[Measure]) -> None:
        """A few tokens of each measure, so that nothing is compiled or first touched later."""
        for measure in measures:
            for system in self._present(measure):
                self._ask(system, measure.command(self.subject, output_tokens=_WARM_UP_TOKENS))

    def alternate(
        self,
        measures: Sequence[Measure],
        bandwidth: ReadBandwidth,
        *,
        alternations: int,
        output_tokens: int,
        end_s: float,
    ) -> None:
        """All of them, but none that begins after `end_s` on the monotonic clock."""
        for turn in range(alternations):
            if turn and time.monotonic() > end_s:
                print(f"{self.subject.name}: out of time after {turn} alternations", flush=True)
                return
            for measure in measures:
                command = measure.command(self.subject, output_tokens=output_tokens)
                for system in self._present(measure):
                    if turn < system.alternations_max:
                        self._sample(system, measure, command, bandwidth=bandwidth, turn=turn)

    def _sample(
        self,
        system: System,
        measure: Measure,
        command: dict[str, Any],
        *,
        bandwidth: ReadBandwidth,
        turn: int,
    ) -> None:
        time.sleep(_SETTLE_S)
        load = os.getloadavg()[0]
        before = bandwidth.measure()
        answer = self._ask(system, command)
        if answer is None:
            return
        time.sleep(_SETTLE_S)
        read = max(before, bandwidth.measure())
        sample = Sample(self.subject.name, measure.name, system.name, turn, answer, read, load)
        self.samples.append(sample)
        print(
            f"{turn} {self.subject.name:5} {measure.name:9} {system.name:9}"
            f" {answer['tokens_per_s']:8.1f} tok/s, decode {answer['decode_tokens_per_s']:8.1f},"
            f" first token {1e3 * answer['ttft_s']:7.1f} ms; read {read / 1e9:5.1f} GB/s,"
            f" load {load:.2f}",
            flush=True,
        )

    def _present(self, measure: Measure) -> list[System]:
        return [
            system
            for system in self.systems
            if system.name in self.children and system.can(measure)
        ]

    def _ask(self, system: System, command: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.children[system.name].ask(command, timeout_s=_ANSWER_S_MAX)
        except PeerError as error:
            self._leave_out(system.name, error)
            self.children.pop(system.name).close()
            return None

    def _leave_out(self, name: str, error: PeerError) -> None:
        self.absent[name] = str(error)
        print(f"{self.subject.name}: without {name}: {error}", flush=True)
