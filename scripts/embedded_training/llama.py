"""A Llama decoder for training only, with the parameter names of a Hugging Face checkpoint.

Kept apart from the serving engine: it has no KV cache, computes in bf16 under autocast over fp32
master weights, and knows how to write the folder that the engine and `transformers` load.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Dimensions of a decoder, under the names of a Hugging Face `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    vocab_size: int = 4096
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


TARGET_SHAPE = LlamaShape(
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
)
DRAFT_SHAPE = LlamaShape(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def rotary_table(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, float32 `[length, head_dim]`, both halves alike."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[batch, heads, length, head_dim]`, halves paired as in Llama."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in the type of its input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention over `[batch, length, hidden]`."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.kv_heads = shape.num_key_value_heads
        self.head_dim = shape.head_dim
        width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: D102
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        # Repeated by hand: the fused attention of the CPU backend wants equal head counts.
        groups = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: D102
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls `model`."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """The whole model; `state_dict()` carries the names of `LlamaForCausalLM`, head tied."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The two writers into the residual stream start smaller, as in GPT-2, so that the
                # stream's variance does not grow with depth.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = (2 * shape.num_hidden_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Bf16 hidden states `[batch, length, hidden]` of int64 `tokens` `[batch, length]`."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cos, sin = rotary_table(self.shape, tokens.shape[1])
            cos, sin = cos.bfloat16(), sin.bfloat16()
            x: Tensor = self.model.embed_tokens(tokens).bfloat16()
            for layer in self.model.layers:
                x = layer(x, cos, sin)
            out: Tensor = self.model.norm(x)
            return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[..., vocab]` of bf16 hidden states `[..., hidden]`."""
        return F.linear(hidden, self.model.embed_tokens.weight.bfloat16()).float()


def write_checkpoint(model: Llama, folder: Path, specials: dict[str, int]) -> None:
    """Write `config.json`, `generation_config.json` and bf16 `model.safetensors` into `folder`.

    `specials` maps `bos_token_id`, `eos_token_id` and `pad_token_id` to token ids. The weights are
    written under a temporary name and renamed, so a stop in the middle leaves the previous ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **specials,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(specials, indent=2) + "\n")
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes it private
    partial.replace(folder / "model.safetensors")


def read_checkpoint(shape: LlamaShape, folder: Path) -> Llama:
    """The model of `shape` with the weights in `folder`; a mismatch raises `RuntimeError`."""
    model = Llama(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model
