"""Writes GGUF files with the format's own library, from state dicts in Hugging Face's names."""

from pathlib import Path

import gguf
import numpy as np
import torch

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name of a tensor in a GGUF file."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "rope_freqs.weight": "rope_freqs.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp's converter orders them."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_model(
    path: Path,
    architecture: str,
    config: dict[str, object],
    state: dict[str, torch.Tensor],
    types: dict[str, gguf.GGMLQuantizationType],
    metadata: dict[str, object] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a model; returns the weights that the file stands for, in Hugging Face's order.

    `types` maps the end of a GGUF tensor name to its type; others are F32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_context_length(config["max_position_embeddings"])
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        count = next((h for part, h in heads.items() if f".{part}." in name), 0)
        order = torch.arange(tensor.shape[0])
        if architecture == "llama" and count:
            order = interleave(order, count)
        data = tensor.float()[order].numpy()
        kind = next((t for end, t in types.items() if gguf_name(name).endswith(end)), None)
        if kind is None:
            writer.add_tensor(gguf_name(name), data)
            stored[name] = tensor.float()
            continue
        if kind.name.endswith("_K"):  # which the library reads but does not write
            raw = random_blocks(data.shape, kind, len(stored), scale=1e-4)
        else:
            raw = gguf.quants.quantize(data, kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        back = torch.from_numpy(gguf.quants.dequantize(raw, kind).reshape(data.shape).copy())
        stored[name] = torch.empty_like(back)
        stored[name][order] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """One metadata entry of the type that its value suggests."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}


def random_blocks(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, seed: int, scale: float = 0.01
) -> np.ndarray:
    """Blocks of random bits with finite scales, uint8 [rows, bytes]."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // elements, size), dtype=np.uint8)
    for at in HALVES.get(kind.name, [0, 2]):
        halves = rng.normal(0, scale, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
