"""Attention over the paged cache: decodes against the bandwidth, prefill against PyTorch's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import Bench, Timing, relative_error
from kernels import ops
from kernels.layer_cache import LayerCache, quantize_heads

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
DECODES = ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 1024), (64, 8192), (256, 1024))
PREFILLS = (1024, 4096, 16384)
CACHE_DTYPES = {"bfloat16": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ALLOWED = 1e-2  # bf16 queries, probabilities and output


@dataclass(frozen=True, slots=True)
class Step:
    """Queries and the cache that they attend to."""

    q: Tensor
    cache: LayerCache
    metadata: ops.AttentionMetadata

    def attend(self) -> Tensor:
        """The operation that is measured."""
        return ops.paged_attention(self.q, self.cache, self.metadata, HEAD_DIM**-0.5)


def make_step(
    bench: Bench, lengths: list[tuple[int, int]], cache_dtype: torch.dtype | None
) -> Step:
    """Sequences of (new tokens, context) over shuffled pages of random contents."""
    pages = [math.ceil(context / BLOCK) for _, context in lengths]
    order = torch.randperm(sum(pages)).tolist()
    tables, start = [], 0
    for count in pages:
        tables.append(order[start : start + count])
        start += count
    shape = (sum(pages), KV_HEADS, BLOCK, HEAD_DIM)
    keys, values = (torch.randn(shape, device=bench.device).bfloat16() for _ in range(2))
    cache = LayerCache(keys, values)
    if cache_dtype is not None:
        cache = _quantized(cache, cache_dtype)
    new = [n for n, _ in lengths]
    metadata = ops.build_attention_metadata(
        tables, new, [c for _, c in lengths], BLOCK, bench.device
    )
    q = torch.randn(sum(new), HEADS, HEAD_DIM, device=bench.device).bfloat16()
    return Step(q, cache, metadata)


def _quantized(cache: LayerCache, dtype: torch.dtype) -> LayerCache:
    parts = []
    for x in (cache.keys, cache.values):
        data = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(x.shape[:3], device=x.device)
        # Piece by piece: rounding widens to float32.
        for begin in range(0, len(x), 8192):
            piece = x[begin : begin + 8192]
            rounded, s = quantize_heads(piece.flatten(0, 1), dtype)
            data[begin : begin + 8192] = rounded.view(piece.shape)
            scales[begin : begin + 8192] = s.view(piece.shape[:3])
        parts.append((data, scales))
    return LayerCache(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def error_of(step: Step, sequence: int, most_queries: int = 16) -> float:
    """Error of the last new tokens of one sequence against float64."""
    metadata, cache = step.metadata, step.cache
    end = sum(metadata.query_lens[: sequence + 1])
    count = min(most_queries, metadata.query_lens[sequence])
    context = metadata.context_lens_list[sequence]
    table = metadata.block_tables[sequence, : math.ceil(context / BLOCK)].long()
    wide = []
    for data, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = data[table].double()
        if scales is not None:
            x = x * scales[table].double().unsqueeze(-1)
        wide.append(x.transpose(0, 1).flatten(1, 2)[:, :context])
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in wide)
    q = step.q[end - count : end].double().transpose(0, 1)
    scores = q @ keys.transpose(1, 2) * HEAD_DIM**-0.5
    position = torch.arange(context, device=q.device)
    hidden = position[None, :] > torch.arange(context - count, context, device=q.device)[:, None]
    exact = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ values
    return relative_error(step.attend()[end - count : end], exact.transpose(0, 1))


def kv_bytes(step: Step) -> int:
    """Bytes of keys, values and scales that attention must read, queries and outputs."""
    tokens = sum(step.metadata.context_lens_list)
    element = step.cache.keys.element_size()
    per_head = HEAD_DIM * element + (4 if step.cache.is_quantized else 0)
    return 2 * tokens * KV_HEADS * per_head + 2 * step.q.numel() * step.q.element_size()


def decodes(bench: Bench) -> Iterator[Row]:
    """One new token a sequence; the peer is SDPA over contiguous caches."""
    for batch, context in ((2, 40),) if bench.rehearsal else DECODES:
        for name, dtype in CACHE_DTYPES.items():
            if bench.is_late:
                return
            lengths = [(1, context)] * batch
            first = make_step(bench, lengths, dtype)
            count = min(8, bench.copies(kv_bytes(first)))
            steps = [first, *(make_step(bench, lengths, dtype) for _ in range(count - 1))]
            row = Row(
                f"decode attention, {name} cache",
                {"batch": batch, "context": context},
                bench.time([step.attend for step in steps]),
                num_bytes=kv_bytes(first),
                error=error_of(first, batch - 1),
                allowed=ALLOWED,
            )
            if dtype is None:
                row.peers = _decode_peers(bench, batch, context, count)
            yield row


def _decode_peers(bench: Bench, batch: int, context: int, count: int) -> dict[str, Timing | str]:
    def call() -> Callable[[], object]:
        q = torch.randn(batch, HEADS, 1, HEAD_DIM, device=bench.device).bfloat16()
        shape = (batch, KV_HEADS, context, HEAD_DIM)
        k, v = (torch.randn(shape, device=bench.device).bfloat16() for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {"sdpa, contiguous cache": bench.time([call() for _ in range(count)])}


def prefills(bench: Bench) -> Iterator[Row]:
    """Whole prompts; peers are SDPA's backends and varlen attention on contiguous operands."""
    for length in (24,) if bench.rehearsal else PREFILLS:
        for cached in (0, length // 2):
            if bench.is_late:
                return
            new = length - cached
            step = make_step(bench, [(new, length)], None)
            pairs = new * (length + cached + 1) / 2  # query and key that see each other
            yield Row(
                "prefill attention" + (", half of it cached" if cached else ""),
                {"tokens": new, "context": length},
                bench.time([step.attend]),
                num_bytes=kv_bytes(step),
                operations=4 * HEADS * HEAD_DIM * pairs,
                error=error_of(step, 0),
                allowed=ALLOWED,
                peers={} if cached else _prefill_peers(bench, length),
            )
    if not bench.is_late:
        lengths = [(7, 7), (9, 30)] if bench.rehearsal else [(n, n) for n in (100, 700, 1500, 2900)]
        step = make_step(bench, lengths, None)
        yield Row(
            "prefill attention, mixed lengths",
            {"tokens": sum(n for n, _ in lengths), "sequences": len(lengths)},
            bench.time([step.attend]),
            num_bytes=kv_bytes(step),
            operations=4 * HEADS * HEAD_DIM * sum(n * (n + 1) / 2 for n, _ in lengths),
            error=error_of(step, len(lengths) - 1),
            allowed=ALLOWED,
        )


def _prefill_peers(bench: Bench, length: int) -> dict[str, Timing | str]:
    q = torch.randn(1, HEADS, length, HEAD_DIM, device=bench.device).bfloat16()
    shape = (1, KV_HEADS, length, HEAD_DIM)
    k, v = (torch.randn(shape, device=bench.device).bfloat16() for _ in range(2))
    peers: dict[str, Timing | str] = {}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            peers[f"sdpa {name}"] = _tried(
                bench,
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            )
    peers["varlen"] = _tried(bench, _varlen(q, k, v))
    return peers


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """`torch.nn.attention.varlen`, whose options differ between versions."""

    def missing() -> object:
        raise RuntimeError("this PyTorch has none")

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return missing
    length = q.shape[2]
    flat = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    options = inspect.signature(varlen_attn).parameters
    if "enable_gqa" in options:
        extra: dict[str, object] = {"enable_gqa": True}
    else:
        flat[1:] = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in flat[1:]]
        extra = {}
    extra |= {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
    starts = torch.tensor([0, length], dtype=torch.int32, device=q.device)
    attend: Callable[..., object] = varlen_attn
    return lambda: attend(*flat, starts, starts, length, length, **extra)


def _tried(bench: Bench, call: Callable[[], object]) -> Timing | str:
    """The time, or why there is none."""
    try:
        return bench.time([call])
    except (RuntimeError, TypeError, ValueError) as error:
        return f"does not run here: {str(error).splitlines()[0][:200]}"
