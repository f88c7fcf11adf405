"""How every service reads its settings: once, from flags and environment, frozen and bounded.

Flags win over environment, and both over files in `/run/secrets`, which are named like the
environment variable in lower case. An unknown flag or a value out of bounds ends the process with
code 2 and one line per problem.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

Settings = TypeVar("Settings", bound=BaseSettings)

SECRETS_DIR: Final = Path("/run/secrets")  # where container engines mount them


class ServiceSettings(BaseSettings):
    """What all four services can be told. Subclasses set `env_prefix` and their own fields."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        secrets_dir=SECRETS_DIR if SECRETS_DIR.is_dir() else None,
    )

    listen: str = Field(
        default="127.0.0.1:0",
        pattern=r"^.+:\d{1,5}$",
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, JSON otherwise"
    )
    grace_s: float = Field(
        default=30.0, ge=0, le=3600, description="time that running work gets to end on SIGTERM"
    )
    max_message_bytes: int = Field(default=8 * 2**20, ge=2**16, le=2**30)
    max_concurrent_streams: int = Field(default=10_000, ge=1, le=1_000_000)


def load_settings(cls: type[Settings], argv: Sequence[str] | None = None) -> Settings:
    """Build the settings from `argv` (default: the process's) and the environment, or exit 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return cls(
            _cli_parse_args=arguments,
            _cli_prog_name=f"python -m {cls.__module__.rpartition('.')[0]}",
        )
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            message = f"{name}: {problem['msg']}" if name else problem["msg"]
            print(message, file=sys.stderr)  # noqa: T201
    except SettingsError as error:
        print(str(error), file=sys.stderr)  # noqa: T201
    sys.exit(2)


def split_options(text: str) -> dict[str, str]:
    """The options of a setting that takes several: `a=1,b=2,3` is two. Raises ValueError."""
    options: dict[str, str] = {}
    name = ""
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if separator:
            name = key.strip()
            options[name] = value.strip()
        elif name:  # the next item of a sequence
            options[name] += f",{part.strip()}"
        else:
            raise ValueError(f"{part!r} must be key=value")
    return options
