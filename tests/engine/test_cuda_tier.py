"""Which models Triton kernels serve on a CUDA device, and what is said of those they don't."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.common.base_model import load_config
from services.worker.engine.api import EngineSettings
from services.worker.engine.build import describe
from services.worker.engine.cuda_tier import cuda_tier
from services.worker.native.library import Unavailable
from tests.engine.cuda_world import write_model


def _reason(folder: Path, settings: EngineSettings, *, ffn: int | None = None) -> str:
    shape = load_config(folder)
    shape = replace(shape, intermediate_size=ffn or shape.intermediate_size)
    tier = cuda_tier(settings, shape, describe(settings, folder, shape))
    assert isinstance(tier, Unavailable)
    return tier.reason


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return EngineSettings(model=folder, device="cuda", max_context_tokens=64)


def _folder(settings: EngineSettings) -> Path:
    assert settings.model is not None
    return settings.model


def test_plain_torch_serves_when_it_is_asked_for(settings: EngineSettings) -> None:
    asking = replace(settings, tier="torch")
    assert "asked for" in _reason(_folder(settings), asking)


def test_widths_that_kernels_do_not_read_are_named(settings: EngineSettings) -> None:
    reason = _reason(_folder(settings), settings, ffn=60)
    assert reason == "a linear's width is no multiple of 8"


def test_blocks_that_hold_no_page_of_an_adapter_are_named(settings: EngineSettings) -> None:
    small = replace(settings, block_tokens=1)
    assert "8 rank rows do not fit into a block of" in _reason(_folder(settings), small)
