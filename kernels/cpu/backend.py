"""The CPU's backend (``kernels.backends.Backend``)."""

from torch import Tensor

from kernels.cpu.attention import paged_attention
from kernels.cpu.elementwise import (
    gelu_and_mul,
    head_rms_norm,
    rms_norm,
    rotary_and_write_kv,
    rotary_embedding,
    silu_and_mul,
    write_kv,
)
from kernels.cpu.move_kv import move_kv

__all__ = [
    "gelu_and_mul",
    "head_rms_norm",
    "move_kv",
    "paged_attention",
    "rms_norm",
    "rotary_and_write_kv",
    "rotary_embedding",
    "route",
    "silu_and_mul",
    "write_kv",
]


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor] | None:  # noqa: ARG001
    """Declined: a token's few logits are no work for a CPU beside its experts."""
    return None
