"""What `calumma up` starts: addresses, and the command line of each process. Starts nothing."""

import errno
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.cli.connect import HEALTH_NAMES
from services.cli.output import CommandError
from services.cli.processes import ProcessSpec

HOST: Final = "127.0.0.1"
DEFAULT_PORT_BASE: Final = 7100
_COMMANDS_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Endpoints:
    """host:port of every process."""

    gateway: str
    scheduler: str
    adapter_store: str
    workers: tuple[str, ...]

    @classmethod
    def on_loopback(cls, port_base: int, workers: int) -> "Endpoints":
        """The four default ports in their order; more workers come after them."""
        first, *more = (2, *range(4, 4 + workers - 1))
        at = [f"{HOST}:{port_base + offset}" for offset in range(4 + workers)]
        return cls(at[0], at[1], at[3], tuple(at[offset] for offset in (first, *more)))

    def labelled(self) -> tuple[tuple[str, str], ...]:
        """Process name and address, in the order of start."""
        numbered = len(self.workers) > 1
        names = [f"worker-{n}" if numbered else "worker" for n in range(1, len(self.workers) + 1)]
        return (
            ("adapter_store", self.adapter_store),
            ("scheduler", self.scheduler),
            *zip(names, self.workers, strict=True),
            ("gateway", self.gateway),
        )

    def commands_to_try(self, prompts: Mapping[str, str]) -> tuple[str, ...]:
        """Three commands that work now: adapters at their job first, then the base model."""
        usual = Endpoints.on_loopback(DEFAULT_PORT_BASE, 1)
        options = f" --gateway {self.gateway}" if self.gateway != usual.gateway else ""
        answers = [
            f"calumma{options} generate -a {name} {shlex.quote(prompt)}"
            for name, prompt in prompts.items()
        ]
        others = (f"calumma{options} generate 'Name three rivers.'", f"calumma{options} chat")
        scheduler = f" --scheduler {self.scheduler}" if self.scheduler != usual.scheduler else ""
        store = "" if not scheduler else f" --adapter-store {self.adapter_store}"
        status = f"calumma{options}{scheduler}{store} status"
        return (*answers, *others, status)[:_COMMANDS_SHOWN]


@dataclass(frozen=True, slots=True)
class Plan:
    """One suite. None leaves a setting to its service's default."""

    model: str
    endpoints: Endpoints
    home: Path | None
    engine: str | None
    device: str | None
    dtype: str | None
    system: str | None
    policy: str | None
    grace_s: float
    log_level: str


def check_ports(endpoints: Endpoints) -> None:
    """Raise CommandError for the first port that something else listens on."""
    for name, address in endpoints.labelled():
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise CommandError(f"cannot listen on {address}: {error.strerror}") from error
                hint = "end what uses it (another `calumma up`?), or give --port-base"
                raise CommandError(f"port {port} for the {name} is taken", hint=hint) from error


def process_specs(plan: Plan) -> tuple[ProcessSpec, ...]:
    """In the order of start: what dials comes after what it dials."""
    endpoints = plan.endpoints
    peers = (("scheduler", endpoints.scheduler), ("adapter-store", endpoints.adapter_store))
    model = ("model", plan.model)
    engine = (("engine", plan.engine), ("device", plan.device), ("dtype", plan.dtype))
    system = ("system", plan.system)
    flags = {
        "adapter_store": (model,),
        "scheduler": (system, ("policy", plan.policy)),
        "worker": (*peers, model, system, *engine),
        "gateway": (*peers, model),
    }
    return tuple(
        _spec(plan, name, address, flags[name.partition("-")[0]])
        for name, address in endpoints.labelled()
    )


def _spec(
    plan: Plan, name: str, address: str, flags: Iterable[tuple[str, str | None]]
) -> ProcessSpec:
    service = name.partition("-")[0]
    common = (
        ("listen", address),
        ("log-format", "json"),
        ("log-level", plan.log_level),
        ("grace-s", f"{plan.grace_s:g}"),
    )
    given = (f"--{flag}={value}" for flag, value in (*common, *flags) if value is not None)
    # -P: a folder `services` where `up` happens to be started must not shadow the installed one.
    launch = (sys.executable, "-P", "-m", "services.cli.launch", str(os.getpid()))
    argv = (*launch, f"services.{service}", *given)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if plan.home is not None:
        env["CALUMMA_HOME"] = str(plan.home)
    return ProcessSpec(name, argv, env, address, HEALTH_NAMES[service])
