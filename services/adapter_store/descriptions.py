"""The grammar of what people say of an adapter: labels, sources, reasons, and for whom it is.

Free text has no control characters, because it ends in terminals and logs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from services.adapter_store.references import shown
from services.common.errors import Reason, RpcError

LABELS_MAX: Final = 32
LABEL_CHARACTERS_MAX: Final = 256
SOURCE_CHARACTERS_MAX: Final = 512
REASON_CHARACTERS_MAX: Final = 256
TENANTS_MAX: Final = 1000
_KEY = re.compile(r"[a-z0-9._/-]{1,64}")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def checked_labels(labels: Mapping[str, str], *, field: str) -> dict[str, str]:
    """Labels by key. Raises INVALID_FIELD or FIELD_LIMIT_EXCEEDED."""
    if len(labels) > LABELS_MAX:
        raise _over(f"{len(labels)} labels; at most {LABELS_MAX}", field)
    for key, value in labels.items():
        if _KEY.fullmatch(key) is None:
            raise _wrong(
                f"{shown(key)} is not a label's key: 1 to 64 characters of [a-z0-9._/-]", field
            )
        _check_text(value, f"the label {key}", field=field, characters_max=LABEL_CHARACTERS_MAX)
    return dict(sorted(labels.items()))


def check_source(text: str, *, field: str) -> None:
    """Raises INVALID_FIELD or FIELD_LIMIT_EXCEEDED."""
    _check_text(text, "the source", field=field, characters_max=SOURCE_CHARACTERS_MAX)


def check_reason(text: str, *, field: str) -> None:
    """Raises INVALID_FIELD or FIELD_LIMIT_EXCEEDED."""
    if not text.strip():
        raise _wrong("a reason is required, for whoever finds the pin", field)
    _check_text(text, "the reason", field=field, characters_max=REASON_CHARACTERS_MAX)


def check_tenant(text: str, *, field: str) -> None:
    """Raises INVALID_FIELD."""
    if _TENANT.fullmatch(text) is None:
        raise _wrong(f"{shown(text)} is not a tenant: 1 to 64 characters of [A-Za-z0-9._-]", field)


def checked_tenants(tenants: Iterable[str], *, field: str) -> tuple[str, ...]:
    """Tenants in order, each once. Raises INVALID_FIELD or FIELD_LIMIT_EXCEEDED."""
    distinct = sorted(set(tenants))
    if len(distinct) > TENANTS_MAX:
        raise _over(f"{len(distinct)} tenants; at most {TENANTS_MAX}", field)
    for tenant in distinct:
        check_tenant(tenant, field=field)
    return tuple(distinct)


def _check_text(text: str, what: str, *, field: str, characters_max: int) -> None:
    if len(text) > characters_max:
        raise _over(f"{what} has {len(text)} characters; at most {characters_max}", field)
    if _CONTROL.search(text):
        raise _wrong(f"{what} has control characters: {shown(text)}", field)


def _wrong(message: str, field: str) -> RpcError:
    return RpcError(Reason.INVALID_FIELD, message, field=field)


def _over(message: str, field: str) -> RpcError:
    return RpcError(Reason.FIELD_LIMIT_EXCEEDED, message, field=field)
