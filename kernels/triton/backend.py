"""Triton's backend (``kernels.backends.Backend``)."""

from kernels.triton.activation import gelu_and_mul, silu_and_mul
from kernels.triton.attention import paged_attention
from kernels.triton.cache_write import rotary_and_write_kv, write_kv
from kernels.triton.move_kv import move_kv
from kernels.triton.norm import head_rms_norm, rms_norm
from kernels.triton.rotary import rotary_embedding
from kernels.triton.route import route

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
