"""A process that answers commands: one JSON object per line each way, commands on stdin.

Owns both ends. `Child` starts such a process and asks it; `serve` is its main loop. What libraries
print goes to a log file instead of among the answers, and its end is shown when an answer is
missing. `Timeline` turns the times at which a batch's tokens came into the figures of its answer.
"""

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

Message = dict[str, Any]

_REPOSITORY: Final = Path(__file__).parent.parent.parent  # from where `-m bench.…` works
_LOG_LINES_SHOWN: Final = 12
_END_S_MAX: Final = 20.0


class PeerError(RuntimeError):
    """A peer could not be started, did not answer in time, or said that it failed."""


class Child:
    """A running process of `argv` with `setting` as its last argument.

    It is given `start_s_max` seconds to be ready. Raises PeerError.
    """

    def __init__(
        self,
        argv: Sequence[str],
        setting: Mapping[str, object],
        *,
        env: Mapping[str, str] | None = None,
        start_s_max: float,
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [*argv, json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=_REPOSITORY,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # so that its own children end with it
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._answer(start_s_max)
        except PeerError:
            self.close()
            raise

    def ask(self, command: Mapping[str, object], *, timeout_s: float) -> Message:
        """The answer to one command. Raises PeerError; the process is of no use then."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer, which says why
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._answer(timeout_s)

    def close(self) -> None:
        """End the process and what it started. Harmless when it has ended."""
        with suppress(OSError):
            cast("Any", self._process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S_MAX)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_END_S_MAX)
        cast("Any", self._process.stdout).close()
        self._log.close()

    def _answer(self, timeout_s: float) -> Message:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(f"no answer in {timeout_s:g} s\n{self._log_tail()}") from None
        if not line:
            raise PeerError(f"it ended\n{self._log_tail()}")
        answer = cast("Message", json.loads(line))
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # a library may have printed before `serve`
                self._answers.put(line)
        self._answers.put("")

    def _log_tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def serve(build: Callable[[Message], Callable[[Message], Message]]) -> None:
    """Be such a process: `build` gets the setting and returns what answers each command.

    An exception becomes an answer with an error, and ends the process.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Message) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        answer_to = build(json.loads(sys.argv[1]))
        say({})
        for line in sys.stdin:
            say(answer_to(json.loads(line)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


class Timeline:
    """When the tokens of a batch came. Its clock starts when it is made."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._steps: list[tuple[float, int, int]] = []

    def step(self, *, firsts: int, tokens: int) -> None:
        """Now `tokens` tokens are there, of which `firsts` are the first ones of their requests."""
        self._steps.append((time.perf_counter() - self._began_s, firsts, tokens))

    def answer(self, first_token_ids: Sequence[int]) -> Message:
        """The figures. Decoding begins when every request has its first token."""
        wall_s = time.perf_counter() - self._began_s
        ttft_s = [at_s for at_s, firsts, _ in self._steps for _ in range(firsts)]
        decoded = [(at_s, tokens) for at_s, _, tokens in self._steps if at_s > ttft_s[-1]]
        tokens = sum(tokens for _, _, tokens in self._steps)
        decode_s = self._steps[-1][0] - ttft_s[-1]
        steps_s = [b - a for (a, _, _), (b, _, _) in pairwise(self._steps) if a >= ttft_s[-1]]
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / wall_s,
            "ttft_s": statistics.median(ttft_s),
            "decode_tokens_per_s": sum(n for _, n in decoded) / decode_s if decoded else 0.0,
            "decode_step_s": statistics.median(steps_s) if steps_s else 0.0,
            "first_token_ids": list(first_token_ids),
        }
