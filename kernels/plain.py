"""Operations in plain PyTorch, batched: what runs on any device when nothing faster is there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_cache import LayerCache, quantize_heads
from kernels.metadata import AttentionMetadata

PIECE = 256  # queries of a windowed prefill chunk that are attended together, at least
TREE_BITS = 64  # new tokens of a sequence that an entry of the metadata's trees tells of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension in float32.

    Rounded to x's dtype before a weight of that dtype, as Hugging Face's Llama does; a weight in
    float32 multiplies before the rounding, as in its Gemma.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype == x.dtype:
        return normed.to(x.dtype) * weight
    return (normed * weight.float()).to(x.dtype)


def rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the table's width of each head in float32, in place."""
    turning = cos_sin_cache.shape[-1]
    half = turning // 2
    angles = cos_sin_cache.index_select(0, positions).float().unsqueeze(1)
    cos, sin = angles[..., :half], angles[..., half:]
    for x in (q, k):
        first, second = x[..., :half].float(), x[..., half:turning].float()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        x[..., :turning] = turned
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """``gelu(gate) * up``."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the largest."""
    weights, experts = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Scatter by (block, offset)."""
    block_size = cache.block_size
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    for x, data, scales in (
        (k, cache.keys, cache.key_scales),
        (v, cache.values, cache.value_scales),
    ):
        if scales is None:
            data[blocks, :, offsets] = x
            continue
        quantized, x_scales = quantize_heads(x, data.dtype)
        # FP8 elements are moved as bytes: indexing is not defined for them on every device.
        data.view(torch.uint8)[blocks, :, offsets] = quantized.view(torch.uint8)
        scales[blocks, :, offsets] = x_scales


def move_kv(cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
    """Gather by (block, offset), then scatter."""
    moved = (sources >= 0) & (targets >= 0)
    sources, targets = sources[moved], targets[moved]
    block_size = cache.block_size
    for data in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if data is None:
            continue
        # Bytes stay bytes: indexing is not defined for FP8 on every device.
        data = data.view(torch.uint8) if data.element_size() == 1 else data
        rows = data[sources // block_size, :, sources % block_size]
        data[targets // block_size, :, targets % block_size] = rows


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


def gather(data: Tensor, scales: Tensor | None, block_tables: Tensor, dtype: torch.dtype) -> Tensor:
    """``gather_pages`` of a cache that may be quantized, in ``dtype``."""
    if scales is None:
        return gather_pages(data, block_tables)
    pages = gather_pages(data.view(torch.uint8), block_tables).view(data.dtype).float()
    return (pages * gather_pages(scales.unsqueeze(-1), block_tables)).to(dtype)


def _decode_pages(
    metadata: AttentionMetadata, block_size: int, window: int
) -> tuple[Tensor, Tensor | None]:
    """Block tables of the leading decodes, cut to the pages that their windows reach into.

    Returns int [num_decodes, n] and the logical number of each row's first page (None: all 0).
    """
    count = metadata.num_single
    lengths = metadata.context_lens_list[:count]
    pages = -(-max(lengths) // block_size)
    if not window:
        return metadata.block_tables[:count, :pages], None
    firsts = [max(0, length - window) // block_size for length in lengths]
    width = max(
        -(-length // block_size) - first for length, first in zip(lengths, firsts, strict=True)
    )
    first_pages = torch.tensor(firsts, device=metadata.block_tables.device)
    wanted = first_pages[:, None] + torch.arange(width, device=first_pages.device)
    # Where a row is narrower than the widest, its last page stands in and is masked.
    return metadata.block_tables[:count].gather(1, wanted.clamp_(max=pages - 1)), first_pages


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attention of the leading ``num_decodes`` sequences, one query each, as batched matmuls."""
    count = metadata.num_single
    heads, kv_heads, head_dim = q.shape[1], cache.num_kv_heads, q.shape[2]
    tables, first_pages = _decode_pages(metadata, cache.block_size, window)
    keys = gather(cache.keys, cache.key_scales, tables, q.dtype)
    values = gather(cache.values, cache.value_scales, tables, q.dtype)
    grouped = q[:count].reshape(count, kv_heads, heads // kv_heads, head_dim)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(keys.shape[2], device=q.device)
    lengths = metadata.context_lens[:count, None]
    if first_pages is not None:
        position = position + first_pages[:, None] * cache.block_size
    beyond = position >= lengths
    if window:
        beyond = beyond | (position < lengths - window)
    scores.masked_fill_(beyond[:, None, None, :], float("-inf"))
    # Slots past the context may hold anything, NaN included, and 0 * NaN is NaN.
    values.masked_fill_(beyond[:, None, :, None], 0)
    weights = torch.softmax(scores, -1).to(q.dtype)
    return torch.matmul(weights, values).reshape(count, heads, head_dim)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    table: Tensor,
    context: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    trees: Tensor | None = None,
) -> Tensor:
    """One prefill chunk: q [new, Hq, Dh] are the last ``new`` of ``context`` positions.

    table: int [max_blocks], this sequence's pages. trees: int64 [new], as in the metadata. Returns
    [new, Hq, Dh].
    """
    new = q.shape[0]
    # Pages that lie wholly before every query's window may have been given to others.
    first_page = max(0, context - new - window + 1) // cache.block_size if window else 0
    pages = table[None, first_page : -(-context // cache.block_size)]
    start = first_page * cache.block_size
    keys = gather(cache.keys, cache.key_scales, pages, q.dtype)[:, :, : context - start]
    values = gather(cache.values, cache.value_scales, pages, q.dtype)[:, :, : context - start]
    mask = None
    if window or soft_cap or trees is not None or 1 < new < context:
        position = torch.arange(start, context, device=q.device)
        query = torch.arange(context - new, context, device=q.device)[:, None]
        mask = position[None, :] <= query
        if window:
            mask &= position[None, :] > query - window
        if trees is not None:
            bits = torch.arange(min(new, TREE_BITS), device=q.device)
            first = context - new - start
            mask[:, first : first + len(bits)] &= (trees[:, None] >> bits & 1).bool()
    if soft_cap:
        assert mask is not None
        return _capped_attention(q, keys, values, mask, scale, soft_cap)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and new > 1,
        scale=scale,
        enable_gqa=q.shape[1] != cache.num_kv_heads,
    )
    return out[0].transpose(0, 1)


def _capped_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, soft_cap: float
) -> Tensor:
    """Scores bounded by ``soft_cap * tanh(score / soft_cap)``, which SDPA does not offer.

    q [new, Hq, Dh], keys and values [1, Hkv, context, Dh], mask bool [new, context].
    """
    new, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.view(new, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped, keys[0].unsqueeze(1).transpose(-1, -2)).float() * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = torch.softmax(scores.masked_fill_(~mask, float("-inf")), -1).to(q.dtype)
    attended = torch.matmul(weights, values[0].unsqueeze(1))
    return attended.permute(2, 0, 1, 3).reshape(new, heads, head_dim)


def prefill_chunks(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    out: Tensor,
) -> None:
    """Attention of all sequences but the leading decodes, into their rows of ``out``.

    With a window, queries are taken in pieces as long as it (or PIECE), so that the work grows with
    the window, not with the context.
    """
    token = metadata.num_single
    for i in range(metadata.num_single, len(metadata.query_lens)):
        end = token + metadata.query_lens[i]
        context = metadata.context_lens_list[i]
        piece = max(window, PIECE) if window else end - token
        for start in range(token, end, piece):
            stop = min(start + piece, end)
            out[start:stop] = prefill_attention(
                q[start:stop],
                cache,
                metadata.block_tables[i],
                context - (end - stop),
                scale,
                window,
                soft_cap,
                None if metadata.trees is None else metadata.trees[start:stop],
            )
        token = end


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Decodes as one batch, then prefill chunks one by one."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = metadata.num_single
    if decodes:
        out[:decodes] = decode_attention(q, cache, metadata, scale, window, soft_cap)
    prefill_chunks(q, cache, metadata, scale, window, soft_cap, out)
    return out
