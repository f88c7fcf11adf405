"""The example adapters on the default model: alone and mixed, in fp32, against PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from services.adapter_store.peft import BaseModel, convert
from services.common.base_model import DEFAULT_MODEL, load_config, pulled_folder
from services.worker.engine import SequenceSpec, add_adapter
from tests.engine.engine_support import OwnedEngine, generated, model_engine, reference_greedy, spec
from tests.engine.peft_blob import peft_blob

_MODEL = pulled_folder(DEFAULT_MODEL)
_ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
_FOLDERS = sorted(path.parent for path in _ADAPTERS.glob("*/adapter_model.safetensors"))
_TOKENS = 24
_PROMPTS = (
    "The meeting on March 5, 2021 was moved to 3 pm.",
    "I loved this film, the music most of all.",
)

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not _MODEL.is_dir(), reason=f"{DEFAULT_MODEL} is not in {_MODEL}"),
    pytest.mark.skipif(not _FOLDERS, reason=f"no adapters in {_ADAPTERS}"),
    # PEFT reads an attribute that transformers deprecates.
]


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    """One prompt per adapter and one for the base model."""
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    names = [*(folder.name for folder in _FOLDERS), "base"]
    chats = [[{"role": "user", "content": _PROMPTS[i % 2]}] for i in range(len(names))]
    return {
        name: tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for name, chat in zip(names, chats, strict=True)
    }


@pytest.fixture(scope="module")
def expected(prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    base = AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32)
    outputs = {"base": reference_greedy(base, prompts["base"], _TOKENS)}
    model = None
    for folder in _FOLDERS:
        name = folder.name
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
        model.set_adapter(name)
        outputs[name] = reference_greedy(model, prompts[name], _TOKENS)
    return outputs


@pytest.fixture(scope="module")
def engine() -> OwnedEngine:
    engine = model_engine(_MODEL)
    for folder in _FOLDERS:
        add_adapter(engine, folder.name, peft_blob(folder)[1])
    return engine


def _specs(prompts: dict[str, list[int]]) -> list[SequenceSpec]:
    return [
        spec(name, prompt, adapter=None if name == "base" else name, max_tokens=_TOKENS)
        for name, prompt in prompts.items()
    ]


def test_each_example_adapter_alone_equals_peft(
    engine: OwnedEngine, prompts: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    for item in _specs(prompts):
        assert generated(engine, [item])[item.sequence_id] == expected[item.sequence_id]


def test_all_example_adapters_mixed_with_the_base_model_equal_peft(
    engine: OwnedEngine, prompts: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    assert generated(engine, _specs(prompts), chunk=24, stagger=1) == expected


def test_the_store_converts_them_to_the_same_bytes() -> None:
    base = BaseModel(load_config(_MODEL), ())
    for folder in _FOLDERS:
        config = (folder / "adapter_config.json").read_bytes()
        weights = memoryview((folder / "adapter_model.safetensors").read_bytes())
        assert convert(config, weights, base, rank_max=256).blob == peft_blob(folder)[1], folder
