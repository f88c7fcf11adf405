"""The engines that are compared: how each is started, and for which measures.

Each runs in a process of its own that sleeps while another one is measured. One that is not
installed, does not start or stops answering is left out, and the report says why.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.engine.measures import OUTPUT_TOKENS, PROMPT_TOKENS, Measure
from bench.engine.models import Subject
from bench.peers.environments import LLAMA_CPP, VLLM, Environment
from bench.peers.lines import Child, PeerError

TIERS: Final = ("native", "torch")
MAX_REQUESTS: Final = 32
MAX_TOKENS: Final = PROMPT_TOKENS + OUTPUT_TOKENS
_START_S_MAX: Final = 180.0
# How long OpenMP's threads spin: libgomp's default, which torch has in PEFT's process, too. Inside
# the suite they sleep at once, because others want the cores.
_SPIN_COUNT: Final = 300_000


@dataclass(frozen=True, slots=True)
class System:
    """`can`: whether it takes part in a measure. `start` raises PeerError.

    `alternations_max`: for one that would take most of the time.
    """

    name: str
    start: Callable[[Subject], Child]
    can: Callable[[Measure], bool]
    alternations_max: int = 1000


def _anything(_measure: Measure) -> bool:
    return True


def _base_only(measure: Measure) -> bool:
    return not measure.mixed


def _mixed_only(measure: Measure) -> bool:
    return measure.mixed


def ours(tier: str) -> System:
    """Our engine in one of its tiers; "auto": the one that a worker chooses."""

    def start(subject: Subject) -> Child:
        setting = {"model": str(subject.folder), "tier": tier, "adapters": _paths(subject)}
        env = {"GOMP_SPINCOUNT": f"{_SPIN_COUNT}"}
        return _child([sys.executable, "-m", "bench.engine.ours"], setting, env)

    return System(tier, start, _anything)


def peft(*, base_too: bool) -> System:
    """PEFT on transformers, in this environment."""

    def start(subject: Subject) -> Child:
        setting = {"model": str(subject.folder), "adapters": _paths(subject)}
        return _child([sys.executable, "-m", "bench.peers.peft"], setting)

    return System("peft", start, _anything if base_too else _mixed_only)


def llama_cpp() -> System:
    """llama.cpp in bf16, which cannot mix adapters."""

    def start(subject: Subject) -> Child:
        setting = {
            "model": str(subject.gguf),
            "max_requests": MAX_REQUESTS,
            "max_tokens": MAX_TOKENS,
        }
        return _child(_argv(LLAMA_CPP, "llama_cpp"), setting, LLAMA_CPP.environ)

    return System("llama_cpp", start, _base_only)


def vllm() -> System:
    """Compiled, without LoRA."""
    return System("vllm", lambda subject: _vllm(subject, []), _base_only)


def vllm_lora(*, base_too: bool, alternations_max: int) -> System:
    """Eager, with LoRA. It takes 20 seconds for 32 mixed requests."""

    def start(subject: Subject) -> Child:
        return _vllm(subject, _paths(subject))

    can = _anything if base_too else _mixed_only
    return System("vllm_lora", start, can, alternations_max)


def _vllm(subject: Subject, adapters: Sequence[str]) -> Child:
    setting = {
        "model": str(subject.folder),
        "adapters": adapters,
        "rank_max": max(subject.ranks),
        "max_requests": MAX_REQUESTS,
        "max_tokens": MAX_TOKENS,
    }
    return _child(_argv(VLLM, "vllm"), setting, VLLM.environ)


def _argv(environment: Environment, name: str) -> list[str]:
    """Raises PeerError when it is not installed."""
    if not environment.is_ready:
        raise PeerError("not installed: `python -m bench engine --setup-peers` does")
    return [str(environment.python), "-m", f"bench.peers.{name}"]


def _child(
    argv: Sequence[str], setting: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> Child:
    return Child(argv, setting, env=env, start_s_max=_START_S_MAX)


def _paths(subject: Subject) -> list[str]:
    return [str(path) for path in subject.adapters]
