"""A Hugging Face folder of a Llama as a GGUF file in bf16, which llama.cpp can read.

The tokenizer is left out: benchmarks send token ids. GGUF keeps the rows of q and k in the order of
the original Llama code, where the two halves that a rotation mixes alternate.
"""

from pathlib import Path
from typing import Any, Final

from services.common.base_model import ModelConfig, UnsupportedModelError, load_config, weight_files

_LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, path: Path) -> None:
    """Convert. Raises BaseModelError, and UnsupportedModelError for what is not a plain Llama."""
    import gguf
    from safetensors.torch import load_file

    config = load_config(folder)
    if config.model_type != "llama" or config.rope_scaling is not None:
        raise UnsupportedModelError(f"{folder} is not a Llama without rope scaling")
    writer = gguf.GGUFWriter(path, "llama")
    _add_fields(writer, config)
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            _add_tensor(writer, config, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_fields(writer: Any, config: ModelConfig) -> None:
    import gguf

    writer.add_name("benchmark")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def _add_tensor(writer: Any, config: ModelConfig, name: str, tensor: Any) -> None:
    """Matrices in bf16, norms in fp32: llama.cpp has no kernels for others."""
    import gguf
    import torch

    new_name = _OUTER_NAMES.get(name) or _layer_name(name)
    if new_name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_heads if "attn_q" in new_name else config.num_kv_heads
        rows, width = tensor.shape
        tensor = tensor.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2)
        tensor = tensor.reshape(rows, width)
    if tensor.dim() == 1:
        writer.add_tensor(new_name, tensor.float().numpy())
        return
    data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(new_name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _layer_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    _, _, layer, *module, kind = name.split(".")
    if ".".join(module) not in _LAYER_NAMES or kind != "weight":
        raise UnsupportedModelError(f"{name} has no place in a Llama's GGUF")
    return f"blk.{layer}.{_LAYER_NAMES['.'.join(module)]}.weight"
