from collections.abc import Callable
from pathlib import Path

import pytest

from services.adapter_store.peft import BaseModel, Converted, convert
from services.common.base_model import load_config
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_tiny_model
from tests.unit.adapter_store.registry_parts import FaultyStorage

BASE_NAME = "acme/tiny-base"
Shapes = dict[str, tuple[int, int]]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder)
    return BaseModel(load_config(folder), (BASE_NAME,))


@pytest.fixture(scope="session")
def convert_folder(base: BaseModel) -> Callable[[Path], Converted]:
    def convert_files(folder: Path) -> Converted:
        config = (folder / CONFIG_FILE).read_bytes()
        weights = (folder / WEIGHTS_FILE).read_bytes()
        return convert(config, memoryview(weights), base, rank_max=64)

    return convert_files


@pytest.fixture
def storage(tmp_path: Path) -> FaultyStorage:
    return FaultyStorage.at(tmp_path)
