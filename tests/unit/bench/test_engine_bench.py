"""What the engine benchmark makes of its peers' answers, and what it does when there are none."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.engine import models, systems, tables
from bench.engine.measures import Measure, Sample, Samples
from bench.engine.models import Subject
from bench.engine.turns import Running
from bench.engine.unused import Unused, adapters_unused
from bench.peers import environments, gguf_model
from bench.peers.lines import Child, PeerError, Timeline
from services.common.base_model import UnsupportedModelError, load_config
from tests.engine.engine_support import VOCAB, tiny_model

_START_S_MAX = 60.0
_ECHO = """
from bench.peers.lines import serve
print("a library says hello")
def build(setting):
    print("and again")
    def answer(command):
        print("and while it answers")
        return {"twice": 2 * setting["factor"] * command["value"]}
    return answer
serve(build)
"""
_SILENT = """
import time
from bench.peers.lines import serve
def build(setting):
    def answer(command):
        time.sleep(60)
    return answer
serve(build)
"""


def _sample(
    system: str, turn: int, tokens_per_s: float, *, measure: str = "base 8", subject: str = "small"
) -> Sample:
    answer = {"tokens_per_s": tokens_per_s, "decode_tokens_per_s": tokens_per_s, "ttft_s": 0.1}
    return Sample(subject, measure, system, turn, answer, 50e9, 0.0)


def _subject(folder: Path, ranks: Sequence[int] = (2, 4), *, base: str = "llama") -> Subject:
    tiny_model(folder / "model", base)
    config = load_config(folder / "model")
    (folder / "adapters").mkdir()
    for index, rank in enumerate(ranks):
        models._write_adapter(folder / "adapters" / f"a{index}", config, rank=rank, seed=index)
    adapters = sorted((folder / "adapters").iterdir())
    return Subject("tiny", folder / "model", folder / "model.gguf", adapters, ranks)


def test_decoding_begins_when_every_request_has_its_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0, 1.0, 2.0, 3.0, 5.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    timeline = Timeline()
    for firsts, tokens in ((1, 1), (1, 2), (0, 2), (0, 2)):
        timeline.step(firsts=firsts, tokens=tokens)
    answer = timeline.answer([4, 5])
    assert answer["tokens"] == 7
    assert answer["tokens_per_s"] == pytest.approx(7 / 6)
    assert answer["ttft_s"] == 1.5
    assert answer["decode_tokens_per_s"] == pytest.approx(4 / 3)
    assert answer["decode_step_s"] == pytest.approx(1.5)
    assert answer["first_token_ids"] == [4, 5]


def test_a_ratio_is_the_median_over_alternations_that_have_both() -> None:
    samples = [_sample("ours", turn, speed) for turn, speed in enumerate((10.0, 90.0, 40.0, 1.0))]
    samples += [_sample("peer", turn, speed) for turn, speed in enumerate((5.0, 30.0, 10.0))]
    found = Samples(samples)
    ours, peer = (("small", "base 8", name) for name in ("ours", "peer"))
    assert found.ratio(ours, peer, "tokens_per_s") == 3.0


def test_a_target_against_a_peer_that_is_absent_does_not_hold() -> None:
    samples = [_sample("native", 0, 1e6, measure="mixed 32")]
    targets = tables.peer_targets(samples, {"peft"})
    assert targets
    assert not any(target.holds for target in targets)


def test_a_shorter_time_to_first_token_is_a_higher_ratio() -> None:
    samples = [_sample(name, 0, 1.0, measure="mixed 32") for name in ("native", "peft")]
    cast("dict[str, Any]", samples[0].answer)["ttft_s"] = 0.01
    targets = {target.name: target for target in tables.peer_targets(samples, {"peft"})}
    ttft = targets["mixed 32: time to first token, peft over native"]
    assert ttft.value == pytest.approx(10.0)
    assert ttft.holds


def test_the_byte_floor_counts_each_adapter_of_the_batch_once(tmp_path: Path) -> None:
    subject = _subject(tmp_path)
    shared = subject.read_bytes + subject.kv_bytes(8 * 96)
    adapters = sum(
        tensor.numel() * 2
        for path in subject.adapters
        for tensor in load_file(path / "adapter_model.safetensors").values()
    )
    floor = tables.byte_floor(subject, Measure("mixed", 8, mixed=True))
    assert floor == pytest.approx(shared / (shared + adapters))


def test_what_a_step_reads_leaves_out_an_embedding_that_is_not_the_head(tmp_path: Path) -> None:
    subject = _subject(tmp_path, base="llama with biases")
    path = subject.folder / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(weights, path)
    assert "lm_head.weight" in weights
    read = [tensor for name, tensor in weights.items() if name != "model.embed_tokens.weight"]
    header_bytes = 10_000  # the files' own
    read_bytes = sum(tensor.numel() * tensor.element_size() for tensor in read)
    assert 0 <= subject.read_bytes - read_bytes <= header_bytes


def test_answers_are_told_from_what_libraries_print() -> None:
    child = Child([sys.executable, "-c", _ECHO], {"factor": 3}, start_s_max=_START_S_MAX)
    try:
        assert child.ask({"value": 7}, timeout_s=30.0) == {"twice": 42}
    finally:
        child.close()


def test_a_failure_in_a_peer_is_an_error_with_its_words() -> None:
    child = Child([sys.executable, "-c", _ECHO], {"factor": 3}, start_s_max=_START_S_MAX)
    try:
        with pytest.raises(PeerError, match="KeyError: 'value'"):
            child.ask({}, timeout_s=30.0)
    finally:
        child.close()


def test_a_peer_that_ends_at_its_start_is_an_error_with_its_last_lines() -> None:
    argv = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(PeerError, match="no such model"):
        Child(argv, {}, start_s_max=_START_S_MAX)


def test_a_silent_peer_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.lines._END_S_MAX", 0.1)
    child = Child([sys.executable, "-c", _SILENT], {}, start_s_max=_START_S_MAX)
    with pytest.raises(PeerError, match=r"no answer in 0\.2 s"):
        child.ask({}, timeout_s=0.2)
    child.close()
    assert child._process.returncode == -9


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALUMMA_HOME", str(tmp_path / "home"))
    running = Running(_subject(tmp_path), [systems.llama_cpp(), systems.vllm()])
    running.start(cast("Any", None))
    assert set(running.absent) == {"llama_cpp", "vllm"}
    assert all("--setup-peers" in why for why in running.absent.values())


def test_an_environment_of_another_recipe_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALUMMA_HOME", str(tmp_path))
    environment = environments.LLAMA_CPP
    environment.folder.mkdir(parents=True)
    made = environment.folder / "recipe.txt"
    readiness = [environment.is_ready]
    for recipe in (environment.recipe, environment.recipe.replace("0.3.36", "0.3.35")):
        made.write_text(recipe)
        readiness.append(environment.is_ready)
    assert readiness == [False, True, False]


class _Recorded:
    """In place of an engine's process: notes commands, and answers one time after the other."""

    def __init__(self, step_s: Sequence[float]) -> None:
        self.kinds: list[str] = []
        self._step_s = iter(step_s)

    def ask(self, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        assert timeout_s > 0
        self.kinds.append(command["kind"])
        return {"decode_step_s": next(self._step_s)} if command["kind"] == "batch" else {}


def test_turns_with_and_without_adapters_alternate_by_abba(tmp_path: Path) -> None:
    child = _Recorded([1.0, 2.0, 3.0, 4.0])
    found = adapters_unused(cast("Child", child), _subject(tmp_path), pairs=2, output_tokens=8)
    assert child.kinds == ["batch", "unload", "batch", "batch", "load", "batch"]
    assert found.with_adapters_s == [1.0, 4.0]
    assert found.without_s == [2.0, 3.0]


def test_what_is_kept_is_the_median_over_pairs() -> None:
    assert Unused([2.0, 4.0, 5.0], [1.0, 4.0, 4.0]).kept == pytest.approx(0.8)


def test_a_gguf_has_the_weights_in_the_order_of_the_original_code(tmp_path: Path) -> None:
    subject = _subject(tmp_path)
    gguf_model.write_gguf(subject.folder, subject.gguf)
    weights = load_file(subject.folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(subject.gguf).tensors}
    assert len(tensors) == len(weights)
    up = _bf16(tensors["blk.1.ffn_up.weight"])
    assert torch.equal(up, weights["model.layers.1.mlp.up_proj.weight"].bfloat16())
    query = _bf16(tensors["blk.2.attn_q.weight"])
    original = weights["model.layers.2.self_attn.q_proj.weight"].bfloat16()
    head_dim = 32
    assert torch.equal(query[0], original[0])
    assert torch.equal(query[1], original[head_dim // 2])  # the one that 0 is rotated with
    assert torch.equal(query[head_dim + 2], original[head_dim + 1])


def _bf16(tensor: Any) -> torch.Tensor:
    """Of a tensor of the reader, which gives bytes."""
    data = np.array(tensor.data)
    return torch.from_numpy(data).view(torch.bfloat16)


@pytest.mark.parametrize("base", ["qwen 3", "llama with biases", "llama 3 rope"])
def test_what_is_no_plain_llama_has_no_gguf(tmp_path: Path, base: str) -> None:
    tiny_model(tmp_path / "model", base)
    with pytest.raises(UnsupportedModelError):
        gguf_model.write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_waves_give_every_request_the_first_token_that_it_has_in_one_batch(
    tmp_path: Path,
) -> None:
    subject = _subject(tmp_path)
    child = systems.ours("torch").start(subject)
    prompts = [[3 + (7 * i + j) % (VOCAB - 3) for j in range(20)] for i in range(5)]
    command = {"prompts": prompts, "adapters": [None, 0, 1, 0, None], "output_tokens": 20}
    try:
        batch = child.ask({"kind": "batch", **command}, timeout_s=60.0)
        waves = child.ask({"kind": "waves", "in_flight": 2, **command}, timeout_s=60.0)
    finally:
        child.close()
    assert batch["tokens"] == waves["tokens"] == 100
    assert batch["first_token_ids"] == waves["first_token_ids"]


def test_adapters_that_went_and_came_back_give_the_same_tokens(tmp_path: Path) -> None:
    child = systems.ours("torch").start(_subject(tmp_path))
    prompts = [list(range(3 + i, 23 + i)) for i in range(4)]
    command = {"kind": "batch", "prompts": prompts, "adapters": [0, 1, 0, 1], "output_tokens": 2}
    try:
        before = child.ask(command, timeout_s=60.0)
        child.ask({"kind": "unload"}, timeout_s=60.0)
        child.ask({"kind": "load"}, timeout_s=60.0)
        after = child.ask(command, timeout_s=60.0)
    finally:
        child.close()
    assert before["first_token_ids"] == after["first_token_ids"]


def test_the_tokenizer_of_the_random_model_has_a_word_for_every_token(tmp_path: Path) -> None:
    models._write_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(32_000))
