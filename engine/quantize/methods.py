"""From a float weight to its quantized form, by the name of a method; no data needed.

The output head is the largest single matrix of a small model and the one whose rounding the next
token feels most, so it gets the finest grid that has a matmul, by channel: int8 for every method
but `none` (with `llm_int8`'s outliers where that is the method). FP8 keeps three bits of mantissa,
an error about three times that of int8 on a row of ordinary weights, so `fp8` too has an int8 head.

Embeddings are looked up, not multiplied; they stay as they are, also where the head is tied to
them (the quantized head is then a copy of its own).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.forms import DenseForm, Int8ChannelForm, IntGroupForm, LinearForm
from engine.quantize.fp8 import quantize_fp8
from engine.quantize.llm_int8 import OUTLIER_THRESHOLD
from engine.quantize.method_table import METHODS, Method
from engine.quantize.nf4 import quantize_nf4
from engine.quantize.rtn import quantize_int4, quantize_int8
from engine.quantize.weight_size import int4_group_size

__all__ = [
    "METHODS",
    "Method",
    "quantize_head",
    "quantize_weight",
]


def quantize_weight(weight: Tensor, method: str) -> LinearForm:
    """Quantize one linear layer's weight, float [N, K].

    A layer whose K no group of four-bit weights divides becomes int8.

    Raises:
        ValueError: a method that does not exist or needs calibration; NaN or infinity in `weight`.
    """
    known = METHODS.get(method)
    if known is None or known.calibrated:
        raise ValueError(f"{method!r} is not a quantization method that needs no calibration")
    if method == "none":
        return DenseForm(weight)
    require_finite(weight)
    if method == "fp8":
        return quantize_fp8(weight)
    if method == "llm_int8":
        return _int8(weight, OUTLIER_THRESHOLD)
    group_size = int4_group_size(weight.shape[1])
    if method == "int8" or group_size is None:
        return _int8(weight)
    if method == "nf4":
        return quantize_nf4(weight, group_size)
    q, scales, zeros = quantize_int4(weight, group_size)
    return IntGroupForm(q, scales, zeros, group_size, bits=4)


def quantize_head(weight: Tensor, method: str) -> LinearForm:
    """Quantize the output head, float [vocabulary, hidden]; any method, calibrated ones included.

    Raises:
        ValueError: as `quantize_weight`.
    """
    if method in ("none", "llm_int8"):
        return quantize_weight(weight, method)
    return quantize_weight(weight, "int8")


def require_finite(weight: Tensor) -> None:
    """Refuse a weight that no scale can be made of.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity, which cannot be quantized")


def _int8(weight: Tensor, outlier_threshold: float = 0.0) -> Int8ChannelForm:
    q, scales = quantize_int8(weight)
    return Int8ChannelForm(q, scales, outlier_threshold)
