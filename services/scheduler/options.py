"""A policy's own options: texts that become its config dataclass."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError


def read_options(make: Callable[[], Any], given: Mapping[str, str]) -> Any:
    """What `make` makes, with these fields set. Raises ValueError that names the option."""
    config = make()
    types = get_type_hints(type(config))
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"no option {unknown[0]!r}; there are: {', '.join(known) or 'none'}")
    values = {name: _read(name, types[name], text) for name, text in given.items()}
    try:
        return dataclasses.replace(config, **values)
    except AssertionError as error:
        told = ", ".join(f"{name}={text}" for name, text in given.items())
        raise ValueError(f"{told}: out of bounds {error}".rstrip()) from error


def _read(name: str, kind: Any, text: str) -> Any:
    """A value of the field's type; a sequence is its items with commas between them."""
    adapter = TypeAdapter(kind)
    try:
        if not any(_is_sequence(part) for part in (kind, *get_args(kind))):
            return adapter.validate_strings(text)
        items = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
        return adapter.validate_json(json.dumps(items), strict=False)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(f"{name}={text}: {problem}") from error


def _is_sequence(kind: Any) -> bool:
    return getattr(kind, "__origin__", kind) in {tuple, list}
