"""Operations in plain PyTorch, batched: what runs on any device when nothing faster is there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.metadata import AttentionMetadata


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm in float32, rounded to x's dtype before the weight, as Hugging Face's Llama does."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate in float32, in place."""
    half = q.shape[-1] // 2
    angles = cos_sin_cache.index_select(0, positions).float().unsqueeze(1)
    cos, sin = angles[..., :half], angles[..., half:]
    for x in (q, k):
        first, second = x[..., :half].float(), x[..., half:].float()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        x.copy_(turned)
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def write_kv(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Scatter by (block, offset)."""
    block_size = key_cache.shape[2]
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    key_cache[blocks, :, offsets] = k
    value_cache[blocks, :, offsets] = v


def gather_pages(cache: Tensor, block_tables: Tensor) -> Tensor:
    """Contiguous keys or values of whole sequences, copied page by page.

    cache [num_blocks, kv_heads, block_size, head_dim], block_tables int [num_seqs, n]
    -> [num_seqs, kv_heads, n * block_size, head_dim]. A (block, head) pair is one contiguous row of
    the cache, so this copies long rows and needs no transpose.
    """
    num_blocks, heads, block_size, head_dim = cache.shape
    head_ids = torch.arange(heads, device=cache.device)
    rows = block_tables.long().unsqueeze(1) * heads + head_ids.view(1, heads, 1)
    pages = cache.view(num_blocks * heads, block_size * head_dim).index_select(0, rows.flatten())
    return pages.view(rows.shape[0], heads, rows.shape[2] * block_size, head_dim)


def decode_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, scale: float
) -> Tensor:
    """Attention of the leading ``num_decodes`` sequences, one query each, as batched matmuls."""
    count = metadata.num_decodes
    heads, kv_heads, head_dim = q.shape[1], key_cache.shape[1], q.shape[2]
    longest = max(metadata.context_lens_list[:count])
    pages = -(-longest // key_cache.shape[2])
    tables = metadata.block_tables[:count, :pages]
    keys = gather_pages(key_cache, tables)
    values = gather_pages(value_cache, tables)
    grouped = q[:count].reshape(count, kv_heads, heads // kv_heads, head_dim)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * scale
    beyond = torch.arange(keys.shape[2], device=q.device) >= metadata.context_lens[:count, None]
    scores.masked_fill_(beyond[:, None, None, :], float("-inf"))
    # Slots past the context may hold anything, NaN included, and 0 * NaN is NaN.
    values.masked_fill_(beyond[:, None, :, None], 0)
    weights = torch.softmax(scores, -1).to(q.dtype)
    return torch.matmul(weights, values).reshape(count, heads, head_dim)


def prefill_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, table: Tensor, context: int, scale: float
) -> Tensor:
    """One prefill chunk: q [new, Hq, Dh] are the last ``new`` of ``context`` positions.

    table: int [max_blocks], this sequence's pages. Returns [new, Hq, Dh].
    """
    new = q.shape[0]
    pages = -(-context // key_cache.shape[2])
    keys = gather_pages(key_cache, table[None, :pages])[:, :, :context]
    values = gather_pages(value_cache, table[None, :pages])[:, :, :context]
    mask = None
    if 1 < new < context:
        position = torch.arange(context, device=q.device)
        mask = position[None, :] <= position[context - new :, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=new == context and new > 1,
        scale=scale,
        enable_gqa=q.shape[1] != key_cache.shape[1],
    )
    return out[0].transpose(0, 1)


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, scale: float
) -> Tensor:
    """Decodes as one batch, then prefill chunks one by one."""
    out = torch.empty_like(q)
    decodes = metadata.num_decodes
    if decodes:
        out[:decodes] = decode_attention(q, key_cache, value_cache, metadata, scale)
    token = decodes
    for i in range(decodes, len(metadata.query_lens)):
        end = token + metadata.query_lens[i]
        out[token:end] = prefill_attention(
            q[token:end],
            key_cache,
            value_cache,
            metadata.block_tables[i],
            metadata.context_lens_list[i],
            scale,
        )
        token = end
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: x [M, K] -> (int8 [M, K], float32 scales [M, 1])."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return torch.round(wide * inverse).to(torch.int8), largest / 127.0


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N].

    CUDA's kernel wants more than 16 rows and multiples of 8, so the operands are padded there.
    """
    if a.device.type != "cuda":
        return torch._int_mm(a, b.t())
    m, k = a.shape
    n = b.shape[0]
    a = F.pad(a, (0, -k % 8, 0, max(32 - m, 0)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]
