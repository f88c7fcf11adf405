"""`python -m services.common.healthcheck HOST:PORT [SERVICE]`: exit 0 when it is serving.

For container health checks. Without SERVICE it asks whether the process is alive, with the full
proto name whether that service is ready.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def is_serving(address: str, service: str) -> bool:
    """Ask grpc.health.v1 once."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types lack the methods
        try:
            response = stub.Check(request, timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not 1 <= len(arguments) <= 2:
        sys.exit("usage: python -m services.common.healthcheck HOST:PORT [SERVICE]")
    sys.exit(0 if is_serving(arguments[0], "".join(arguments[1:])) else 1)
