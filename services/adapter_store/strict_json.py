"""JSON that has one meaning: no duplicate keys, no NaN, nothing after the object.

Readers disagree about duplicate keys (the first wins, or the last), so a file with one can be two
different adapters to two programs.
"""

import json
from typing import Any, NoReturn

from services.adapter_store.refusals import invalid, shown


def parse_object(data: bytes, *, file: str) -> dict[str, Any]:
    """Read one JSON object. Raises ADAPTER_INVALID with `file` as the field."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse
        )
    except RecursionError as error:
        raise invalid(f"{file}: the JSON is nested too deeply", field=file) from error
    except ValueError as error:
        raise invalid(f"{file}: not valid JSON: {shown(str(error))}", field=file) from error
    if not isinstance(value, dict):
        raise invalid(f"{file}: not a JSON object", field=file)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
