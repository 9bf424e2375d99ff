"""The CPU's backend (``kernels.backends.Backend``)."""

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

__all__ = [
    "gelu_and_mul",
    "head_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary_and_write_kv",
    "rotary_embedding",
    "silu_and_mul",
    "write_kv",
]
