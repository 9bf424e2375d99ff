"""Plain PyTorch, the simplest possible: the oracle that every backend is tested against.

Every function works in the dtype it is given (float64 included) and favours obviousness over speed.
Shapes are those of ``kernels.ops``.
"""

import torch
from torch import Tensor

from kernels.layer_cache import LayerCache, quantize_heads
from kernels.metadata import AttentionMetadata


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and the sum itself."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate pairs ``(i, i + turning/2)`` of every head by the angle of the token's position.

    ``turning`` is the table's width; dimensions of the head beyond it stay.
    """
    cos, sin = cos_sin_cache[positions].to(q.dtype).unsqueeze(1).chunk(2, dim=-1)
    turning = cos_sin_cache.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., :turning].chunk(2, dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, x[..., turning:]], dim=-1)

    return rotate(q), rotate(k)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` where x is ``[gate, up]`` along the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """``gelu(gate) * up``, by the error function or by its approximation with tanh."""
    gate, up = x.chunk(2, dim=-1)
    if approximate == "none":
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * 0.5 * (1 + torch.tanh(inner)) * up


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``."""
    return cap * torch.tanh(x / cap)


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest probabilities of each row and where they stand, largest first."""
    weights, experts = [], []
    for row in logits:
        probabilities = torch.exp(row - row.max())
        probabilities = probabilities / probabilities.sum()
        order = sorted(range(len(row)), key=lambda i: -float(row[i]))[:top_k]
        chosen = probabilities[order]
        weights.append(chosen / chosen.sum() if normalize else chosen)
        experts.append(torch.tensor(order))
    return torch.stack(weights), torch.stack(experts)


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Store each token's keys and values at its physical slot, quantized by head if asked."""
    for x, data, scales in (
        (k, cache.keys, cache.key_scales),
        (v, cache.values, cache.value_scales),
    ):
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, cache.block_size)
            if scales is None:
                data[block, :, offset] = x[token]
            else:
                quantized, token_scales = quantize_heads(x[token : token + 1], data.dtype)
                data[block, :, offset] = quantized[0]
                scales[block, :, offset] = token_scales[0]


def move_kv(cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
    """Copy what each source slot held before the call to its target; none where one is below 0."""
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is None:
            continue
        before = tensor.clone()
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            if source < 0 or target < 0:
                continue
            page, offset = divmod(target, cache.block_size)
            tensor[page, :, offset] = before[
                source // cache.block_size, :, source % cache.block_size
            ]


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of each new token over its sequence's pages, one query head at a time.

    With a ``window`` a token sees itself and the ``window - 1`` before it; with trees not those
    new tokens whose bits are 0.
    """
    block_size = cache.block_size
    trees = None if metadata.trees is None else metadata.trees.tolist()
    group = q.shape[1] // cache.num_kv_heads
    all_keys, all_values = cache.keys.to(q.dtype), cache.values.to(q.dtype)
    if cache.key_scales is not None and cache.value_scales is not None:
        all_keys = all_keys * cache.key_scales.to(q.dtype).unsqueeze(-1)
        all_values = all_values * cache.value_scales.to(q.dtype).unsqueeze(-1)
    out = torch.empty_like(q)
    token = 0
    for table, new, context in zip(
        metadata.block_tables.tolist(),
        metadata.query_lens,
        metadata.context_lens_list,
        strict=True,
    ):
        slots = [table[p // block_size] * block_size + p % block_size for p in range(context)]
        blocks = torch.tensor([s // block_size for s in slots], device=q.device)
        offsets = torch.tensor([s % block_size for s in slots], device=q.device)
        keys = all_keys[blocks, :, offsets]  # [context, kv_heads, head_dim]
        values = all_values[blocks, :, offsets]
        for i in range(new):
            end = context - new + i + 1
            start = max(0, end - window) if window else 0
            seen_keys, seen_values = keys[start:end], values[start:end]
            if trees is not None:
                hidden = {context - new + j for j in range(64) if not trees[token] >> j & 1}
                seen = [p - start for p in range(start, end) if p not in hidden]
                seen_keys, seen_values = seen_keys[seen], seen_values[seen]
            for head in range(q.shape[1]):
                scores = seen_keys[:, head // group] @ q[token, head] * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[token, head] = torch.softmax(scores, 0) @ seen_values[:, head // group]
            token += 1
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    out = x @ weight.transpose(0, 1)
    return out if bias is None else out + bias


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization of each row: ``x ~ q * scale``, scale = max|row| / 127.

    x[..., K] -> (int8 [..., K], scales [..., 1] in float32 or wider). A row of zeros has scale 0.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return torch.round(wide * inverse).to(torch.int8), largest / 127.0


E4M3_VALUES = sorted(
    (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    for exponent in range(16)
    for fraction in range(8)
    if (exponent, fraction) != (15, 7)  # NaN
)


def round_e4m3(x: Tensor) -> Tensor:
    """x to the nearest of the e4m3 numbers, ties to the even one, saturating; in x's dtype."""
    values = torch.tensor(E4M3_VALUES, dtype=torch.float64, device=x.device)
    size = x.double().abs().clamp(max=float(values[-1]))
    above = torch.searchsorted(values, size).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - size, size - values[below]
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (values[nearest] * x.double().sign()).to(x.dtype)


def fp8_rows(x: Tensor, block: int = 0) -> Tensor:
    """Each row of x [M, K] rounded to e4m3 by its own maximum / 448, by blocks of columns if asked.

    Returns the rounded values times their scales.
    """
    out = torch.zeros_like(x)
    width = block or max(1, x.shape[1])
    for begin in range(0, x.shape[1], width):
        part = x[:, begin : begin + width]
        # In float32 as the kernels do it, so that what lies between two codes falls the same way.
        largest = part.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
        rounded = round_e4m3(part.float() * (torch.full_like(largest, 448.0) / largest))
        out[:, begin : begin + width] = (rounded * (largest / 448)).to(x.dtype)
    return out


def int8_linear(x: Tensor, weight: Tensor, outlier_threshold: float = 0.0) -> Tensor:
    """x [M, K] quantized by rows to int8, elements at or above the threshold left as they are."""
    outlying = x.abs() >= outlier_threshold if outlier_threshold else torch.zeros_like(x).bool()
    q, scales = quantize_rows(x.masked_fill(outlying, 0))
    return linear(q.to(x.dtype) * scales.to(x.dtype) + x * outlying, weight)


def kept_probabilities(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """What ``kernels.sampling`` draws from, for one row [vocabulary]; dropped tokens have 0."""
    probabilities = torch.softmax(logits / temperature, 0)
    probabilities = probabilities * (probabilities >= min_p * probabilities.max())
    descending = probabilities.sort(descending=True).values
    if 0 < top_k < len(logits):
        probabilities = probabilities * (probabilities >= descending[top_k - 1])
        descending = probabilities.sort(descending=True).values
    last = 0
    while descending[: last + 1].sum() < top_p * descending.sum() and last + 1 < len(logits):
        last += 1
    probabilities = probabilities * (probabilities >= descending[last])
    return probabilities / probabilities.sum()
