"""The tenants file: what each tenant may have, in TOML.

    [default]                    # of every tenant that is not named below; all fields are optional
    weight = 1.0                 # of its share while tenants compete, 0.001 to 1000
    max_queued = 1000            # requests that may wait for the limits below, more are refused

    [tenants.acme]               # a tenant's name as its credential says it; quoted if need be
    weight = 4.0
    tokens_per_s = 2000.0        # prompt and output together; absent: no limit
    burst_tokens = 20000         # may be taken at once after a rest; absent: 10 s of the rate
    max_running = 32             # requests past this quota at the same time; absent: no limit
    priority = 10                # its class, added to each request's own priority, -1000 to 1000

A named tenant takes nothing from `[default]`: a field that a table leaves out has the default of
`services.core.tenants.TenantLimits`. Unknown tables and fields are refused. Read once, at start.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from services.core.tenants import TenantLimits, Tenants
from services.core.types import TenantId
from services.scheduler.validation import ID_CHARACTERS_MAX

_FILE_BYTES_MAX: Final = 16 * 2**20
_TENANTS_MAX: Final = 100_000
_Name = Annotated[str, StringConstraints(pattern=rf"^[!-~]{{1,{ID_CHARACTERS_MAX}}}$")]


class TenantsFileError(ValueError):
    """What is wrong with a tenants file, one line per problem."""


class _Limits(BaseModel):
    """A table of limits. Bounds are the core's; here are only the types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weight: float = 1.0
    tokens_per_s: float | None = None
    burst_tokens: float | None = None
    max_running: int | None = None
    max_queued: int = 1000
    priority: int = 0


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    default: _Limits = _Limits()
    tenants: dict[_Name, _Limits] = Field(default_factory=dict, max_length=_TENANTS_MAX)


def load_tenants(path: Path) -> Tenants:
    """Read a tenants file. Raises TenantsFileError that names the tenants and fields."""
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise TenantsFileError(f"{path}: is over {_FILE_BYTES_MAX} bytes")
        parsed = tomllib.loads(path.read_text(encoding="utf-8"))
        file = _File.model_validate(parsed)
    except OSError as error:
        raise TenantsFileError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TenantsFileError(f"{path}: is not TOML: {error}") from error
    except ValidationError as error:
        problems = [f"{_place(one['loc'])}: {one['msg']}" for one in error.errors()]
        raise TenantsFileError("\n".join(f"{path}: {problem}" for problem in problems)) from error
    return Tenants(
        _limits(path, "default", file.default),
        {
            TenantId(name): _limits(path, f"tenants.{name}", table)
            for name, table in file.tenants.items()
        },
    )


def _limits(path: Path, place: str, table: _Limits) -> TenantLimits:
    try:
        return TenantLimits(**table.model_dump())
    except ValueError as error:
        raise TenantsFileError(f"{path}: {place}.{error}") from error


def _place(location: tuple[int | str, ...]) -> str:
    return re.sub(r"\.\[key\]$", " (name)", ".".join(str(part) for part in location))
