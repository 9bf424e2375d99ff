"""Random paged caches with every slot that attention must not read set to NaN."""

from dataclasses import dataclass

import torch

from kernels import ops, reference
from kernels.layer_cache import LayerCache, quantize_heads

RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@dataclass
class Case:
    """Queries, the cache they attend to, and how."""

    q: torch.Tensor
    cache: ops.LayerCache
    tables: list[list[int]]
    metadata: ops.AttentionMetadata
    scale: float
    window: int = 0
    soft_cap: float = 0.0


def make_case(
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    sequences: list[tuple[int, int]],
    generator: torch.Generator,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Case:
    """Sequences are (new tokens, context).

    Slots outside every context are NaN, and so are pages wholly before every window.
    """
    counts = [-(-context // block_size) for _, context in sequences]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables: list[list[int]] = []
    for count in counts:
        tables.append(order[:count])
        order = order[count:]
    shape = (sum(counts) + 3, kv_heads, block_size, head_dim)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    for table, (new, context) in zip(tables, sequences, strict=True):
        unseen = max(0, context - new - window + 1) // block_size if window else 0
        for i, block in enumerate(table):
            used = min(block_size, context - i * block_size)
            for cache in caches:
                if i >= unseen:
                    rows = torch.randn(kv_heads, used, head_dim, generator=generator)
                    cache[block, :, :used] = rows
    queries = [new for new, _ in sequences]
    metadata = ops.build_attention_metadata(tables, queries, [c for _, c in sequences], block_size)
    q = torch.randn(sum(queries), kv_heads * group, head_dim, generator=generator).to(dtype)
    cached = make_cache(caches[0], caches[1], cache_dtype or dtype)
    return Case(q, cached, tables, metadata, head_dim**-0.5, window, soft_cap)


def make_cache(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> ops.LayerCache:
    """A cache of these contents; where they are NaN, scales are NaN and elements the largest."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return LayerCache(keys.to(dtype), values.to(dtype))
    blocks, heads, block_size, head_dim = keys.shape
    data, scales = [], []
    for x in (keys, values):
        rows = x.view(blocks * heads, block_size, head_dim)
        quantized, row_scales = quantize_heads(rows.nan_to_num(), dtype)
        unwritten = rows.isnan().any(-1)
        worst = torch.where(unwritten[..., None], torch.tensor(127.0), quantized.float()).to(dtype)
        data.append(worst.view(x.shape))
        scales.append(row_scales.masked_fill(unwritten, float("nan")).view(x.shape[:3]))
    return LayerCache(data[0], data[1], scales[0], scales[1])


def attend(case: Case, q: torch.Tensor, metadata: ops.AttentionMetadata) -> torch.Tensor:
    """The case's attention of these queries."""
    return ops.paged_attention(q, case.cache, metadata, case.scale, case.window, case.soft_cap)


def expected_of(case: Case) -> torch.Tensor:
    """The float64 reference, over the very same cache."""
    cache = case.cache
    wide = LayerCache(
        cache.keys.double(), cache.values.double(), cache.key_scales, cache.value_scales
    )
    return reference.paged_attention(
        case.q.double(), wide, case.metadata, case.scale, case.window, case.soft_cap
    )


def check(case: Case, allowed: float | None = None) -> torch.Tensor:
    """Attention's output, after its comparison with the reference."""
    actual, expected = attend(case, case.q, case.metadata), expected_of(case)
    assert actual.shape == case.q.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (allowed or RELATIVE_ERROR[case.q.dtype]), float(error)
    return actual


def alone(case: Case, sequence: int, new: int, context: int) -> torch.Tensor:
    """The last ``new`` of ``context`` tokens of one sequence, with nobody else in the step."""
    metadata = ops.build_attention_metadata(
        [case.tables[sequence]], [new], [context], case.cache.block_size
    )
    before = case.metadata.context_lens_list[sequence] - context
    end = sum(case.metadata.query_lens[: sequence + 1]) - before
    return attend(case, case.q[end - new : end], metadata)
