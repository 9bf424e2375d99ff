"""What a loaded decoder asks of the kernels: its linear layers and its attention, at serving sizes.

Each comes as an `Operation` on random data. Weights of one kind are those of all layers, so that
who times them can go from one to the next and meet the memory as a step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.models.block import Mlp
from engine.models.decoder import Decoder
from engine.models.experts import Experts, run_experts
from kernels import ops
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.ops import ConcatWeight, LinearWeight
from kernels.triton.measure import Operation

# Far more than any L2 cache, so that no timed step finds its keys there; less than most GPUs have
# free beside a model.
CACHE_BYTES = 512 << 20
# Tokens of the contexts, and new tokens of each prefill: whole prompts down to short ends of those
# whose beginning is cached. A step has PREFILL_TOKENS of them.
CONTEXT = 4096
CHUNKS = (2048, 512, 128, 1024, 256, 64, 32, 16)
PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes at which an engine serves: sequences and tokens of a step, and its KV caches.

    The first of `cache_dtypes` (None: the model's own) and `block_sizes` are tuned first.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    cache_dtypes: Sequence[torch.dtype | None] = (None,)
    block_sizes: Sequence[int] = (16,)


@dataclass(frozen=True, slots=True)
class Tunable:
    """An operation that is made when it is its turn, so that one at a time takes memory."""

    name: str
    make: Callable[[], Operation]


def tunable_operations(decoder: Decoder, sizes: Sizes) -> list[Tunable]:
    """Everything worth measuring, the most important first.

    Linear layers at the row counts of decodes, attention with the config's own cache, linear layers
    at those of prefills, attention with the other caches.
    """
    kinds = _linear_kinds(decoder)
    decode, prefill = row_ladder(sizes)
    attention = list(_attention(decoder, sizes))
    own = len(attention) // max(1, len(sizes.cache_dtypes) * len(sizes.block_sizes))
    return [
        *_linears(decoder, kinds, decode, with_head=True),
        *attention[:own],
        *_linears(decoder, kinds, prefill, with_head=False),
        *attention[own:],
    ]


def row_ladder(sizes: Sizes) -> tuple[list[int], list[int]]:
    """Powers of two: rows of decode steps upwards, then those that only prefills have, downwards.

    Each stands for the row counts up to it and above the next lower one.
    """
    rows = [1]
    while rows[-1] < max(sizes.max_num_batched_tokens, sizes.max_num_seqs):
        rows.append(2 * rows[-1])
    decode = [m for m in rows if m < 2 * sizes.max_num_seqs]
    return decode, [m for m in reversed(rows) if m >= 2 * sizes.max_num_seqs]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Weights that ask the same of the kernels."""

    name: str
    weights: list[LinearWeight]
    experts: list[Experts]
    is_head: bool = False


def _linear_kinds(decoder: Decoder) -> list[_Kind]:
    found: dict[Any, _Kind] = {}

    def add(name: str, weight: LinearWeight, *, is_head: bool = False) -> None:
        if isinstance(weight, ConcatWeight):
            for part in weight.parts:
                add(name, part, is_head=is_head)
            return
        kind = found.setdefault((is_head, _signature(weight)), _Kind(name, [], [], is_head))
        kind.weights.append(weight)

    for layer in decoder.layers:
        add("qkv", layer.qkv)
        add("output", layer.output)
        if isinstance(layer.mlp, Mlp):
            add("gate_up", layer.mlp.gate_up)
            add("down", layer.mlp.down)
        else:
            found.setdefault("experts", _Kind("experts", [], [])).experts.append(layer.mlp)
    add("head", decoder.head, is_head=True)
    return list(found.values())


def _signature(weight: LinearWeight) -> tuple[Any, ...]:
    """What of a weight a kernel's speed may depend on."""
    names = ("layout", "group_size", "block_shape", "activations", "outlier_threshold")
    return (
        type(weight).__name__,
        weight.shape,
        weight.dtype,
        weight.bias is None,
        getattr(weight, "permutation", None) is None,
        *(getattr(weight, name, None) for name in names),
    )


def _linears(
    decoder: Decoder, kinds: Sequence[_Kind], ladder: Sequence[int], *, with_head: bool
) -> Iterator[Tunable]:
    for rows in ladder:
        for kind in kinds:
            if with_head or not kind.is_head:
                make = partial(_linear, decoder, kind, rows)
                yield Tunable(f"{kind.name}, {_count(rows, 'row')}", make)


def _linear(decoder: Decoder, kind: _Kind, rows: int) -> Operation:
    columns = kind.weights[0].shape[1] if kind.weights else decoder.spec.hidden_size
    x = torch.randn(rows, columns, device=decoder.device).to(decoder.dtype)
    runs: list[Callable[[], Tensor]]
    if kind.experts:
        runs = [partial(run_experts, decoder.spec, experts, x) for experts in kind.experts]
        nbytes = kind.experts[0].nbytes
    else:
        runs = [partial(ops.linear, x, weight) for weight in kind.weights]
        nbytes = kind.weights[0].nbytes
    return Operation(kind.name, runs, nbytes + x.nbytes)


def _attention(decoder: Decoder, sizes: Sizes) -> Iterator[Tunable]:
    longest = sizes.max_model_len
    shapes = [((1,) * batch, min(CONTEXT, longest)) for batch in _batches(sizes)]
    for new in CHUNKS:
        chunk = min(new, sizes.max_num_batched_tokens, longest)
        tokens = min(PREFILL_TOKENS, sizes.max_num_batched_tokens)
        count = max(1, min(tokens // chunk, sizes.max_num_seqs))
        shapes.append(((chunk,) * count, max(chunk, min(CONTEXT, longest))))
    shapes = list(dict.fromkeys(shapes))
    for block_size in sizes.block_sizes:
        for cache_dtype in sizes.cache_dtypes:
            dtype = cache_dtype or decoder.dtype
            for window in sorted(set(decoder.spec.layer_windows)):
                for query_lens, context in shapes:
                    what = _count(len(query_lens), "decode" if query_lens[0] == 1 else "prefill")
                    if query_lens[0] > 1:
                        what += f" of {query_lens[0]}"
                    yield Tunable(
                        f"attention, {what} at {context}, cache {_short(dtype)}",
                        partial(
                            _attend, decoder, sizes, dtype, block_size, window, query_lens, context
                        ),
                    )


def _batches(sizes: Sizes) -> list[int]:
    """Decode batches in powers of two, every third first: a budget that ends leaves no wide gap."""
    ladder, _ = row_ladder(sizes)
    return [batch for begin in range(3) for batch in ladder[begin::3]]


def _attend(
    decoder: Decoder,
    sizes: Sizes,
    dtype: torch.dtype,
    block_size: int,
    window: int,
    query_lens: Sequence[int],
    context: int,
) -> Operation:
    spec, device, sequences = decoder.spec, decoder.device, len(query_lens)
    per_token = 2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    length = -(-context // block_size)
    # Sequences beyond what the memory takes read pages of others: the cache is no L2 cache.
    pages = max(length, min(sequences * length, CACHE_BYTES // (per_token * block_size)))
    cache = random_cache((pages, spec.num_kv_heads, block_size, spec.head_dim), dtype, device)
    # As wide as in a captured step, whose tables take the longest sequence.
    tables = torch.zeros(sequences, -(-sizes.max_model_len // block_size), dtype=torch.int32)
    tables[:, :length] = (
        torch.randperm(pages).repeat(-(-sequences * length // pages))[: sequences * length]
    ).view(sequences, length)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    metadata = AttentionMetadata(
        block_tables=tables.to(device),
        context_lens=torch.full((sequences,), context, dtype=torch.int32, device=device),
        query_start=starts.to(torch.int32).to(device),
        slots=torch.zeros(sum(query_lens), dtype=torch.int64, device=device),
        query_lens=list(query_lens),
        context_lens_list=[context] * sequences,
        num_decodes=sequences if max(query_lens) == 1 else 0,
    )
    q = torch.randn(sum(query_lens), spec.num_heads, spec.head_dim, device=device)
    run = partial(
        ops.paged_attention,
        q.to(decoder.dtype),
        cache,
        metadata,
        spec.attention_scale,
        window,
        spec.attention_soft_cap,
    )
    seen = min(context, window + max(query_lens)) if window else context
    return Operation("attention", [run], sequences * seen * per_token)


def random_cache(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """A cache full of random keys and values: zeros are faster than what is served."""
    cache = LayerCache.allocate(shape, dtype, device)
    for data in (cache.keys, cache.values):
        if dtype == torch.int8:
            data.random_(-127, 128)
        else:
            # Some pages at a time: in float32 all of it may not fit.
            for pages in torch.split(data, 256):
                pages.copy_(torch.randn(pages.shape, device=device))
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.fill_(1 / 64 if dtype == torch.int8 else 1.0)
    return cache


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
