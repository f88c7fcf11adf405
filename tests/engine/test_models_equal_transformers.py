"""Each family in fp32 against transformers: what comes out of each layer, logits, greedy tokens."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from services.common.base_model import load_config
from services.worker.engine import Sampling
from services.worker.engine.executor import Pass, Segment
from services.worker.engine.kv import PagedCache
from services.worker.engine.model import Model, Weights
from services.worker.engine.sampling import Draw, SamplingRow
from services.worker.engine.torch_executor import TorchExecutor
from tests.engine.engine_support import (
    distribution,
    generate,
    generated,
    model_engine,
    reference_greedy,
    spec,
)
from tests.engine.tiny_families import FAMILIES, POSITIONS, VOCAB, WINDOW, tiny_family

_CPU = torch.device("cpu")
_BLOCK_TOKENS = 16
_TOKENS = 80  # beyond the original context of scaled rotations, within the sliding windows
_EVERYTHING = Sampling(logprobs=VOCAB)


def _prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def _executor(folder: Path) -> TorchExecutor:
    config = load_config(folder)
    weights = Weights(folder, dtype=torch.float32, device=_CPU)
    model = Model(config, weights, max_positions=_TOKENS, dtype=torch.float32)
    cache = PagedCache(
        config, blocks=8, block_tokens=_BLOCK_TOKENS, dtype=torch.float32, device=_CPU
    )
    return TorchExecutor(model, cache, dtype=torch.float32, device=_CPU)


def _pass(prompt: list[int], start: int, rows: int) -> Pass:
    """Some rows of one context, in blocks that do not lie side by side. All logits are wanted."""
    blocks = [5, 0, 7, 2, 3]
    return Pass(
        segments=(Segment(None, start, rows, blocks),),
        token_ids=np.array(prompt[start : start + rows], dtype=np.int32),
        positions=np.arange(start, start + rows, dtype=np.int32),
        wanted=np.arange(rows, dtype=np.int32),
    )


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"{what}: off by {error:.1e} of its largest value"


def _distributions(draws: list[Draw | None]) -> Tensor:
    return torch.tensor([[p for _, p in sorted(draw.top)] for draw in draws if draw is not None])


@torch.inference_mode()
def _reference(model: PreTrainedModel, prompt: list[int]) -> tuple[list[Tensor], Tensor]:
    """Hidden states behind the embedding and each layer but the last, and log-probabilities."""
    output = model(torch.tensor([prompt]), output_hidden_states=True)
    # The last hidden state is what comes out of the norm behind the last layer.
    return [state[0] for state in output.hidden_states[:-1]], output.logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_gives_what_it_gives_in_transformers(name: str, tmp_path: Path) -> None:
    prompt = _prompt(_TOKENS)
    states, distributions = _reference(tiny_family(tmp_path, name), prompt)
    executor = _executor(tmp_path)
    for start, rows in ((0, 50), (50, _TOKENS - 50)):
        at = slice(start, start + rows)
        under_way = _pass(prompt, start, rows)
        for layer, state in enumerate(states):
            assert executor.run([under_way], [layer]) is None
            _assert_close(executor.hidden(under_way), state[at], f"layer {layer} from {start}")
        scores = executor.run([under_way], [len(states)])
        assert scores is not None
        draws = scores.draw([SamplingRow(_EVERYTHING, prompt, _TOKENS)] * rows)
        _assert_close(_distributions(draws), distributions[at], f"logits from {start}")


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny_family(tmp_path, name)
    engine = model_engine(tmp_path)
    prompts = {f"{length} tokens": _prompt(length) for length in (1, 5, 40, 70)}
    expected = {at: reference_greedy(reference, prompt) for at, prompt in prompts.items()}
    specs = [spec(at, prompt) for at, prompt in prompts.items()]
    assert generated(engine, specs, chunk=32) == expected


@pytest.mark.parametrize("name", ["mistral 0.1", "qwen 2, upper layers slide", "smollm 3, sliding"])
def test_the_context_is_as_long_as_a_sliding_window_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    reference = tiny_family(tmp_path, name)
    engine = model_engine(tmp_path)
    assert engine.info.max_context_tokens == WINDOW

    config = copy.deepcopy(FAMILIES[name])
    config.sliding_window = POSITIONS
    wide = AutoModelForCausalLM.from_config(config).float().eval()
    wide.load_state_dict(reference.state_dict())
    assert torch.equal(_last_logits(reference, WINDOW), _last_logits(wide, WINDOW))
    assert not torch.equal(_last_logits(reference, WINDOW + 1), _last_logits(wide, WINDOW + 1))

    whole = spec("whole", _prompt(WINDOW), sampling=_EVERYTHING, max_tokens=1)
    (token,) = generate(engine, [whole])["whole"]
    expected = _last_logits(reference, WINDOW).log_softmax(-1)
    _assert_close(distribution(token), expected, "logits at the end of the window")


@torch.inference_mode()
def _last_logits(model: PreTrainedModel, tokens: int) -> Tensor:
    logits: Tensor = model(torch.tensor([_prompt(tokens)])).logits[0, -1]
    return logits
