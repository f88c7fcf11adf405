"""A process for `calumma up`'s supervision: `HOST:PORT serves|dies|stubborn|silent`.

"dies": ends with code 3 before it serves. "stubborn": ignores SIGTERM. "silent": never serves.
Otherwise it serves health for every name until SIGTERM. Every process says when it starts.
"""

import json
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def main(address: str, mode: str) -> None:
    sys.stdout.write(json.dumps({"event": "begun", "timestamp": "2026-01-01T00:00:00Z"}) + "\n")
    sys.stdout.flush()
    sys.stderr.write("a bare line\n")
    if mode == "dies":
        sys.exit(3)
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: end.set())
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = grpc.server(ThreadPoolExecutor(2))
    healths = health.HealthServicer()
    healths.set("probe", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    if mode != "silent":
        server.add_insecure_port(address)
        server.start()
    while not end.wait(0.05):
        pass
    sys.stdout.write("a last word\n")
    sys.stdout.flush()
    server.stop(0).wait()


main(sys.argv[1], sys.argv[2])
