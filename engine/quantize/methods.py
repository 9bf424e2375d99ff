"""The values of the knob `quantization`: what becomes of each linear layer.

- `none`: weights in the model's dtype.
- `int8`: every linear layer and the output head as W8A8 with dynamic activations.
- `int4`: linear layers weight-only in groups; the output head int8. The head is the largest single
  matrix of a small model and the one whose rounding the next token feels most, so it gets the
  finer grid, at half of the bytes of bf16.

Embeddings are looked up, not multiplied; they stay as they are, also where the head is tied to
them (the quantized head is then a copy of its own).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from engine.quantize.rtn import int4_group_size, quantize_int4, quantize_int8
from kernels.ops import LinearWeight, pack_dense, pack_int4, pack_int8

Method = Literal["none", "int8", "int4"]


def pack_linear(weight: Tensor, bias: Tensor | None, method: Method) -> LinearWeight:
    """Quantize one layer's weight [N, K] and lay it out for `kernels.ops.linear`.

    A layer whose K no int4 group divides becomes int8.
    """
    if method == "none":
        return pack_dense(weight, bias)
    group_size = int4_group_size(weight.shape[1]) if method == "int4" else None
    if group_size is None:
        q, scales = quantize_int8(weight)
        return pack_int8(q, scales, bias)
    q, scales, zeros = quantize_int4(weight, group_size)
    return pack_int4(q, scales, zeros, group_size, bias)


def pack_head(weight: Tensor, method: Method) -> LinearWeight:
    """Quantize the output head [vocabulary, hidden]; see above."""
    return pack_linear(weight, None, "none" if method == "none" else "int8")
