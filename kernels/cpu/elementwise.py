"""Norms, rotary embedding, gated activations and cache writes by the native kernels.

Every function returns None (or False) when it cannot take its operands; plain PyTorch then does.
"""

import ctypes

import torch
from torch import Tensor

from kernels import plain
from kernels.cpu.native import CACHE_CODES, DTYPE_CODES, library, takes
from kernels.head_norms import HeadNorms
from kernels.layer_cache import LayerCache

LANES = 16  # quantized heads must fill whole vectors


def _weight_fits(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype in (x.dtype, torch.float32) and weight.is_contiguous()


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor | None:
    """The norm of x, or of ``residual += x`` when a residual is given."""
    native = library()
    if native is None or not takes(x) or x.dim() != 2 or x.stride(1) != 1:
        return None
    if not _weight_fits(weight, x):
        return None
    if residual is not None and (residual.dtype != x.dtype or not residual.is_contiguous()):
        return None
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype)
    native.rms_norm(
        DTYPE_CODES[x.dtype],
        weight.dtype == torch.float32,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return out


def _heads_are_packed(x: Tensor) -> bool:
    return x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    """Norm each head in place; False if the operands are not of the expected kind."""
    native = library()
    if native is None or not takes(x) or not _heads_are_packed(x) or not _weight_fits(weight, x):
        return False
    native.head_rms_norm(
        DTYPE_CODES[x.dtype],
        weight.dtype == torch.float32,
        x.data_ptr(),
        weight.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.shape[2],
        x.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return True


def rotary_embedding(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> bool:
    """Rotate in place; False if the operands are not of the expected kind."""
    native = library()
    if native is None or not takes(q) or k.dtype != q.dtype:
        return False
    if not (_heads_are_packed(q) and _heads_are_packed(k)):
        return False
    if cos_sin_cache.dtype != torch.float32 or not cos_sin_cache.is_contiguous():
        return False
    if positions.dtype != torch.int64 or not positions.is_contiguous():
        return False
    native.rotary_embedding(
        DTYPE_CODES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        positions.data_ptr(),
        cos_sin_cache.data_ptr(),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        cos_sin_cache.shape[1],
        q.stride(0),
        k.stride(0),
        torch.get_num_threads(),
    )
    return True


def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: LayerCache,
    slots: Tensor,
    norms: HeadNorms | None = None,
) -> bool:
    """Rotate in place, then store; False if the operands are not of the expected kind.

    Norms are declined: the caller's own calls make the same passes.
    """
    if norms is not None or not rotary_embedding(q, k, positions, cos_sin_cache):
        return False
    if not write_kv(k, v, cache, slots):
        plain.write_kv(k, v, cache, slots)
    return True


def silu_and_mul(x: Tensor) -> Tensor | None:
    """``silu(gate) * up``."""
    native = library()
    if native is None or not takes(x) or x.dim() != 2 or not x.is_contiguous():
        return None
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    native.silu_and_mul(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        out.data_ptr(),
        rows,
        width // 2,
        torch.get_num_threads(),
    )
    return out


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor | None:
    """``gelu(gate) * up``."""
    native = library()
    if native is None or not takes(x) or x.dim() != 2 or not x.is_contiguous():
        return None
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    native.gelu_and_mul(
        DTYPE_CODES[x.dtype],
        approximate == "tanh",
        x.data_ptr(),
        out.data_ptr(),
        rows,
        width // 2,
        torch.get_num_threads(),
    )
    return out


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> bool:
    """Store heads at their slots; False if the operands are not of the expected kind."""
    native = library()
    key_cache, value_cache = cache.keys, cache.values
    if native is None or not takes(k) or k.dtype != v.dtype:
        return False
    if not (_heads_are_packed(k) and _heads_are_packed(v)):
        return False
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        return False
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        return False
    if cache.key_scales is not None and cache.value_scales is not None:
        if k.shape[2] % LANES or key_cache.dtype != value_cache.dtype:
            return False
        if not (cache.key_scales.is_contiguous() and cache.value_scales.is_contiguous()):
            return False
        _write_quantized(native, k, key_cache, cache.key_scales, slots)
        _write_quantized(native, v, value_cache, cache.value_scales, slots)
        return True
    if not (k.dtype == key_cache.dtype == value_cache.dtype):
        return False
    size = k.element_size()
    native.write_kv(
        k.data_ptr(),
        v.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slots.data_ptr(),
        k.shape[0],
        k.shape[1],
        key_cache.shape[2],
        k.shape[2] * size,
        k.stride(0) * size,
        v.stride(0) * size,
        torch.get_num_threads(),
    )
    return True


def _write_quantized(
    native: ctypes.CDLL, x: Tensor, data: Tensor, scales: Tensor, slots: Tensor
) -> None:
    native.write_quantized(
        DTYPE_CODES[x.dtype],
        CACHE_CODES[data.dtype],
        x.data_ptr(),
        data.data_ptr(),
        scales.data_ptr(),
        slots.data_ptr(),
        x.shape[0],
        x.shape[1],
        data.shape[2],
        x.shape[2],
        x.stride(0),
        torch.get_num_threads(),
    )
