"""How services dial each other: channels with keepalive and limits, and backoff between tries."""

import random
from collections.abc import Sequence
from typing import Any, Final

import grpc

MESSAGE_BYTES_MAX: Final = 64 * 2**20
_OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(target: str) -> grpc.aio.Channel:
    """A plain-text channel to "host:port" or any gRPC name. The caller closes it."""
    return grpc.aio.insecure_channel(target, options=list(_OPTIONS))


class Backoff:
    """Full-jitter exponential delays: uniform in [0, min(cap, base · 2^n)] seconds."""

    def __init__(self, *, base_s: float = 0.1, cap_s: float = 3.0) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._tries = 0

    def next_delay_s(self) -> float:
        """Delay before the next try."""
        ceiling_s = min(self._cap_s, self._base_s * 2 ** min(self._tries, 16))
        self._tries += 1
        return random.uniform(0.0, ceiling_s)

    def reset(self) -> None:
        """Begin again after a success."""
        self._tries = 0
