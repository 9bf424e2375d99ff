"""Every operation once: what it computes, its shapes, dtypes and units; and its backend.

T: tokens in the step. Hq, Hkv: query and key/value heads (Hq a multiple of Hkv). Dh: head
dimension. Floating dtypes are float32, bfloat16 and float16. Caches are described in
``kernels.layer_cache``.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import plain
from kernels.backends import backend_for
from kernels.cpu import matmul as cpu_matmul
from kernels.experts import StackedWeight, pack_experts, run_stacked
from kernels.head_norms import HeadNorms
from kernels.layer_cache import LayerCache
from kernels.linears import (
    concat,
    dequantize,
    linear,
    pack_dense,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_int8_groups,
    pack_table4,
)
from kernels.metadata import AttentionMetadata, build_attention_metadata
from kernels.weights import (
    ConcatWeight,
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    LinearWeight,
    Table4Weight,
)

__all__ = [
    "AttentionMetadata",
    "ConcatWeight",
    "DenseWeight",
    "Fp8Weight",
    "HeadNorms",
    "Int4Weight",
    "Int8GroupWeight",
    "Int8Weight",
    "LayerCache",
    "LinearWeight",
    "StackedWeight",
    "Table4Weight",
    "add_rms_norm",
    "build_attention_metadata",
    "concat",
    "dequantize",
    "embedding",
    "gelu_and_mul",
    "head_rms_norm",
    "linear",
    "move_kv",
    "pack_dense",
    "pack_experts",
    "pack_fp8",
    "pack_int4",
    "pack_int8",
    "pack_int8_groups",
    "pack_table4",
    "paged_attention",
    "rms_norm",
    "rotary_and_write_kv",
    "rotary_embedding",
    "route",
    "run_stacked",
    "silu_and_mul",
    "soft_cap",
    "write_kv",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` by rows; x [T, D], weight [D] -> [T, D].

    A weight in x's dtype multiplies what was rounded to it (Llama); a float32 weight multiplies in
    float32, and the product is rounded once (Gemma, whose weight is 1 + w).
    """
    normed = backend_for(x).rms_norm(x, None, weight, eps)
    return plain.rms_norm(x, weight, eps) if normed is None else normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its norm; x, residual [T, D] -> (normed, residual).

    ``residual`` is updated in place and returned; x is left as it is. Weights as in ``rms_norm``.
    """
    normed = backend_for(x).rms_norm(x, residual, weight, eps)
    if normed is None:
        residual.add_(x)
        normed = plain.rms_norm(residual, weight, eps)
    return normed, residual


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` over the head dimension, in place; x [T, H, Dh], weight [Dh] -> x.

    The heads of one token are contiguous; the stride between tokens is free, so a view of a fused
    QKV works.
    """
    if not backend_for(x).head_rms_norm(x, weight, eps):
        x.copy_(plain.rms_norm(x, weight, eps))
    return x


def rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq, Dh] and k [T, Hkv, Dh] in place by their positions, and return them.

    Pairs are ``(i, i + Dh/2)`` (the "rotate half" convention of Hugging Face's Llama).
    positions: int64 [T]. cos_sin_cache: float32 [max_position, Dh], cosines then sines; a table
    narrower than Dh, [max_position, R], turns the first R dimensions of each head (partial rotary
    embedding, pairs ``(i, i + R/2)``). The heads of one token are contiguous; the stride between
    tokens is free, so a view of a fused QKV works.
    """
    if not backend_for(q).rotary_embedding(q, k, positions, cos_sin_cache):
        plain.rotary_embedding(q, k, positions, cos_sin_cache)
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :I]) * x[:, I:]``; x [T, 2 I] -> [T, I]."""
    out = backend_for(x).silu_and_mul(x)
    return plain.silu_and_mul(x) if out is None else out


def gelu_and_mul(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """``gelu(x[:, :I]) * x[:, I:]``; x [T, 2 I] -> [T, I].

    GELU by the error function, or by ``tanh``, its approximation (``gelu_pytorch_tanh``).
    """
    out = backend_for(x).gelu_and_mul(x, approximate)
    return plain.gelu_and_mul(x, approximate) if out is None else out


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, elementwise in float32, in x's dtype; of Gemma 2's logits."""
    return torch.tanh(x.float() / cap).mul_(cap).to(x.dtype)


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Which experts take each token: the ``top_k`` of the softmax, largest first.

    logits [T, E] -> (weights float32 [T, top_k], experts int64 [T, top_k]). The softmax is in
    float32 and over all experts; with ``normalize`` the chosen weights are divided by their sum,
    which is the softmax over the chosen ones alone (Mixtral; Qwen3-MoE's ``norm_topk_prob``).
    """
    routed = backend_for(logits).route(logits, top_k, normalize)
    return plain.route(logits, top_k, normalize) if routed is None else routed


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Store k, v [T, Hkv, Dh] into the cache at physical ``slots`` (int64 [T]).

    On a GPU a slot below 0 stores nothing: a captured step has rows to spare. A quantized cache
    rounds each head of each token by its own maximum.
    """
    if not backend_for(k).write_kv(k, v, cache, slots):
        plain.write_kv(k, v, cache, slots)


def move_kv(cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
    """Copy the keys and values at slots `sources` to slots `targets`, int64 [M] both.

    What every source held before the call is what its target holds after it, though slots be in
    both; targets differ. A quantized cache's scales go along. Nothing is moved where either slot is
    below 0. Waits for no device.
    """
    if sources.shape[0] and not backend_for(cache.keys).move_kv(cache, sources, targets):
        plain.move_kv(cache, sources, targets)


def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: LayerCache,
    slots: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """``rotary_embedding`` and then ``write_kv``, in one pass where a kernel fuses them.

    With ``norms``, ``head_rms_norm`` of q and of k comes before. Returns q, rotated in place. k is
    changed in place too or left as it is: the cache has it.
    """
    backend = backend_for(q)
    if not backend.rotary_and_write_kv(q, k, v, positions, cos_sin_cache, cache, slots, norms):
        if norms is not None:
            head_rms_norm(q, norms.query, norms.eps)
            head_rms_norm(k, norms.key, norms.eps)
        rotary_embedding(q, k, positions, cos_sin_cache)
        write_kv(k, v, cache, slots)
    return q


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention over paged contexts, decodes and prefill chunks mixed.

    q [T, Hq, Dh], tokens in the order of ``metadata``; the step's own keys and values must already
    be in the cache (``write_kv``). ``scale`` multiplies the scores. With a ``window`` each token
    sees itself and the ``window - 1`` before it; pages that lie wholly before the windows of a
    sequence's new tokens are never read, and their entries in the block table may be any. A
    ``soft_cap`` bounds scaled scores to ``soft_cap * tanh(score / soft_cap)``; 0 turns either off.
    Returns [T, Hq, Dh]. Raises ValueError for a window beside the metadata's trees.
    """
    if window and metadata.trees is not None:
        raise ValueError("attention of trees has no window: a tree's slots are not its positions")
    out = backend_for(q).paged_attention(q, cache, metadata, scale, window, soft_cap)
    if out is None:
        out = plain.paged_attention(q, cache, metadata, scale, window, soft_cap)
    return out


def embedding(token_ids: Tensor, weight: DenseWeight) -> Tensor:
    """Rows of a dense weight; token_ids int64 [T] -> [T, K].

    Works on every layout, so that a tied output head and the embedding share one copy.
    """
    if weight.layout in ("amx", "panels"):
        rows = cpu_matmul.embedding(token_ids.flatten(), weight)
        return rows.view(*token_ids.shape, weight.shape[1])
    return F.embedding(token_ids, weight.data)
