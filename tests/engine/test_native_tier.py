"""Which tier serves a model on the CPU, and what the log can say about it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from services.worker.engine import EngineInfo, EngineSettings, build_engine
from services.worker.native import library as native
from services.worker.native.build import find_compiler
from services.worker.native.library import Library, Unavailable, load
from services.worker.native.probe import find_library, probe
from tests.engine.engine_support import TINY_CONFIGS, tiny_model
from tests.engine.native_support import needs_native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder)
    return folder


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the library is forgotten, before and after."""
    find_library.cache_clear()
    yield
    find_library.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "_step.0.so")


def _info(settings: EngineSettings) -> EngineInfo:
    return build_engine(settings).info


@needs_native
@pytest.mark.parametrize("tier", ["auto", "native"])
def test_compiled_code_serves_bfloat16_on_the_cpu(folder: Path, tier: str) -> None:
    info = _info(EngineSettings(model=folder, tier=tier, threads=2))  # type: ignore[arg-type]
    assert info.description == "native cpu bfloat16 avx512_bf16, 2 threads"
    assert info.without_native is None


@needs_native
def test_the_torch_tier_serves_who_asks_for_it(folder: Path) -> None:
    info = _info(EngineSettings(model=folder, tier="torch"))
    assert info.description == "torch cpu bfloat16"
    assert info.without_native == "the torch tier is asked for"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_are_computed_by_torch(folder: Path, dtype: str) -> None:
    settings = EngineSettings(model=folder, dtype=dtype)  # type: ignore[arg-type]
    info = _info(settings)
    assert info.description == f"torch cpu {dtype}"
    assert info.without_native == "it computes in bfloat16 on the CPU only"


def test_the_native_tier_refuses_other_types(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot serve: it computes in bfloat16 .*tier auto"):
        build_engine(EngineSettings(model=folder, dtype="float32", tier="native"))


@pytest.mark.usefixtures("unbuilt")
def test_without_the_library_torch_serves_and_says_why(folder: Path) -> None:
    info = _info(EngineSettings(model=folder))
    assert info.description == "torch cpu bfloat16"
    assert info.without_native == "its library is not built; `make native` does that"


@pytest.mark.usefixtures("unbuilt")
def test_without_the_library_the_native_tier_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot serve: its library is not built; `make native`"):
        build_engine(EngineSettings(model=folder, tier="native"))


@needs_native
def test_a_shape_that_the_library_refuses_is_computed_by_torch(tmp_path: Path) -> None:
    shape: dict[str, Any] = TINY_CONFIGS["llama"].to_dict() | {"intermediate_size": 129}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(tmp_path)
    info = _info(EngineSettings(model=tmp_path))
    assert info.description == "torch cpu bfloat16"
    assert info.without_native == "hidden and ffn must be even"


@needs_native
def test_the_probe_is_right_and_near() -> None:
    library = load()
    assert isinstance(library, Library)
    assert 0 < probe(library) < 0.02


@needs_native
def test_the_probe_is_asked_once() -> None:
    assert find_library() is find_library()


_WRONG = """
#include <cstring>
#include "{header}"
static int32_t vocab;
const char *calumma_isa(void) {{ return "wrong"; }}
const char *calumma_error(void) {{ return ""; }}
calumma_model *calumma_open(const calumma_config *c) {{
  vocab = c->vocab;
  return (calumma_model *)&vocab;
}}
void calumma_close(calumma_model *) {{}}
int calumma_set_linear(calumma_model *, int32_t, int32_t, const calumma_bf16 *, int32_t, int32_t,
                       const float *) {{ return 0; }}
int calumma_set_norm(calumma_model *, int32_t, int32_t, const float *, int32_t) {{ return 0; }}
int calumma_set_embedding(calumma_model *, const calumma_bf16 *) {{ return 0; }}
int calumma_set_rotation(calumma_model *, const float *, const float *) {{ return 0; }}
int calumma_set_rotates(calumma_model *, int32_t, int32_t) {{ return 0; }}
int calumma_set_cache(calumma_model *, calumma_bf16 *, int32_t) {{ return 0; }}
void calumma_clear_blocks(calumma_model *, const int32_t *, int32_t) {{}}
calumma_adapter *calumma_adapter_open(calumma_model *) {{ return (calumma_adapter *)&vocab; }}
int calumma_adapter_set(calumma_adapter *, int32_t, int32_t, int32_t, const calumma_bf16 *,
                        const calumma_bf16 *, float) {{ return 0; }}
void calumma_adapter_close(calumma_adapter *) {{}}
int calumma_run(calumma_model *, const calumma_pass *passes, int32_t count,
                const calumma_scores *scores) {{
  for (int32_t row = 0; scores && row < passes[0].wanted; row++)
    for (int32_t id = 0; id < vocab; id++) scores->logits[row][id] = {logit};
  return {status};
}}
"""


@needs_native
@pytest.mark.parametrize(
    ("logit", "status", "reason"),
    [
        ("0.0f", 0, "its probe is wrong by 1 of the largest logit"),
        ("0.0f / 0.0f", 0, "its probe is wrong by nan of the largest logit"),
        ("0.0f", 1, "its probe failed: no reason given"),
    ],
)
@pytest.mark.usefixtures("forgotten")
def test_a_library_that_computes_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logit: str, status: int, reason: str
) -> None:
    source, path = tmp_path / "wrong.cpp", tmp_path / "_step.0.so"
    header = Path(native.__file__).parent / "step.h"
    source.write_text(_WRONG.format(header=header, logit=logit, status=status))
    options = ["-shared", "-fPIC", str(source), "-o", str(path)]
    subprocess.run([*find_compiler(), *options], check=True)
    monkeypatch.setattr(native, "library_path", lambda: path)
    assert find_library() == Unavailable(reason)


def test_numbers_of_the_probe_are_those_that_bf16_has() -> None:
    from services.worker.native.probe import _bf16, _rounded

    values = np.array([1.0, 1.00390625, -3.14159, 1e-20, 2.0**100])
    rounded = _rounded(values)
    assert (_bf16(rounded).astype(np.uint32) << 16).view(np.float32).tolist() == rounded.tolist()
    assert np.abs(rounded / values - 1).max() < 2**-8
