"""The three ways in which an uploaded adapter is refused, and how client text is quoted in them."""

from reprlib import repr as shortened

from services.common.errors import Reason, RpcError

_SHOWN_CHARACTERS_MAX = 120


def invalid(message: str, *, field: str) -> RpcError:
    """The files contradict their format, or each other."""
    return RpcError(Reason.ADAPTER_INVALID, message, field=field)


def unsupported(message: str, *, field: str) -> RpcError:
    """The files are right, and ask for something that is not served."""
    return RpcError(Reason.ADAPTER_UNSUPPORTED, message, field=field)


def mismatch(message: str, *, field: str) -> RpcError:
    """The adapter is for another base model."""
    return RpcError(Reason.ADAPTER_BASE_MISMATCH, message, field=field)


def shown(value: object) -> str:
    """A value from an upload, short and printable: JSON may hold anything, even lone surrogates."""
    text = value if isinstance(value, str) else shortened(value)
    cut = text if len(text) <= _SHOWN_CHARACTERS_MAX else f"{text[:_SHOWN_CHARACTERS_MAX]}…"
    return ascii(cut)[1:-1] or "''"
