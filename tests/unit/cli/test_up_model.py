"""`calumma up` looks at the model before it starts anything."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG, "model.safetensors"),
        ({**CONFIG, "architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        (None, "config.json"),
    ],
    ids=["no weights", "unsupported architecture", "empty folder"],
)
def test_a_model_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, config: dict[str, object] | None, says: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    result = CliRunner().invoke(
        app, ["up", f"--model={tmp_path}", "--no-adapters", "--port-base=24500"]
    )

    assert result.exit_code != 0
    assert says in f"{result.output}{result.exception}"
    assert "started" not in result.output
