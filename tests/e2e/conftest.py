"""One whole suite for this folder: four processes, the real model in fp32, the example adapters."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bench.suite import Suite, running_suite
from services.common.base_model import DEFAULT_MODEL, ModelNotFoundError, locate
from tests.support.otlp import OtlpReceiver


@pytest.fixture(scope="session")
def model_folder() -> Path:
    try:
        return locate(DEFAULT_MODEL)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A cache folder of its own, so that nothing published before is seen; the model is shared."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(model_folder.parent)
    return folder


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def suite(home: Path, otlp: OtlpReceiver) -> Iterator[Suite]:
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with running_suite("--home", str(home), "--dtype", "float32", env=env) as running:
        yield running


@pytest.fixture
def channel(suite: Suite) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(suite.gateway) as gateway:
        yield gateway


@pytest.fixture
def store_channel(suite: Suite) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(str(suite.endpoints["adapter_store"])) as store:
        yield store
