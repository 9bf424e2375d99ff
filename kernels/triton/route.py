"""Routing of tokens to experts: softmax and the largest few."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.runtime import FLOATS

MOST_EXPERTS = 1024


@triton.jit
def _route_kernel(
    logits,
    weights,
    experts,
    stride,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < EXPERTS
    values = tl.load(logits + row * stride + expert, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    shares = tl.exp(values - tl.max(values, 0))
    shares = shares / tl.sum(shares, 0)
    # As integers in the same order, below which there is room for what is taken or beyond the
    # last expert: a logit of minus infinity or NaN cannot choose an expert twice or none.
    bits = values.to(tl.int32, bitcast=True)
    order = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    rank = tl.arange(0, BLOCK_K)
    taken = tl.zeros((BLOCK_K,), tl.float32)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    for k in range(TOP_K):
        best = tl.argmax(order, 0)
        share = tl.sum(tl.where(expert == best, shares, 0.0), 0)
        taken = tl.where(rank == k, share, taken)
        chosen = tl.where(rank == k, best, chosen)
        order = tl.where(expert == best, -0x80000000, order)
    if NORMALIZE:
        taken = taken / tl.sum(taken, 0)
    tl.store(weights + row * TOP_K + rank, taken, mask=rank < TOP_K)
    tl.store(experts + row * TOP_K + rank, chosen.to(tl.int64), mask=rank < TOP_K)


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor] | None:
    """The experts of each token, largest logit first and of equals the first, and their weights."""
    if logits.dim() != 2 or logits.dtype not in FLOATS or logits.stride(1) != 1:
        return None
    rows, count = logits.shape
    if not 0 < top_k <= count <= MOST_EXPERTS:
        return None
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((rows, top_k), dtype=torch.int64, device=logits.device)
    if rows:
        # One warp a token: every reduction stays within it.
        _route_kernel[(rows,)](
            logits,
            weights,
            experts,
            logits.stride(0),
            EXPERTS=count,
            BLOCK_E=triton.next_power_of_2(count),
            TOP_K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            NORMALIZE=normalize,
            num_warps=1,
        )
    return weights, experts
