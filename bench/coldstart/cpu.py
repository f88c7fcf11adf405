"""How much CPU time processes have used, as Linux counts it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_PARENT, _USER, _SYSTEM = 1, 11, 12  # fields of /proc/PID/stat behind the name


def cpu_s(pid: int) -> float:
    """Seconds of all threads of a process so far."""
    fields = _fields(pid)
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK")


def all_cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """The same of several, by name."""
    return {name: cpu_s(pid) for name, pid in pids.items()}


def child(name: str) -> int:
    """The id of this process's child of that name."""
    for folder in _PROC.glob("[0-9]*"):
        try:
            is_it = (folder / "comm").read_text().strip() == name
            parent = int(_fields(int(folder.name))[_PARENT])
        except OSError:  # it has just ended
            continue
        if is_it and parent == os.getpid():
            return int(folder.name)
    raise LookupError(f"no child {name}")


def _fields(pid: int) -> list[str]:
    text = (_PROC / str(pid) / "stat").read_text()
    return text.rpartition(")")[2].split()
