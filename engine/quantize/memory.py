"""Bytes that a model's weights should take, from its sizes and its method alone.

What `Decoder.nbytes` reports is checked against this, and a search can tell what fits before
anything is loaded.
"""

from __future__ import annotations

from engine.models.spec import DecoderSpec
from engine.models.tensors import Root, layer_linears
from engine.quantize.method_table import METHODS
from engine.quantize.rtn import int4_group_size

# As the kernels hold them on a CPU with AMX: float32, and float16 for what it holds exactly.
_SCALE = 4
_ZERO = 2


def theoretical_bytes(spec: DecoderSpec, method: str, dtype_bytes: int = 2) -> int:
    """Weights in their bits, scales and zeros, and what stays in floats of `dtype_bytes`.

    Linear layers are as `engine.quantize.methods` makes them, the output head int8; embeddings,
    norms, biases and routers stay. A head that is tied to the embeddings is a copy of its own
    unless `method` is "none".

    Raises:
        KeyError: a method that does not exist.
    """
    vocabulary, hidden = spec.vocab_size, spec.hidden_size
    total = vocabulary * hidden * dtype_bytes  # embeddings
    if method != "none":
        total += linear_bytes(vocabulary, hidden, "int8", dtype_bytes)
    elif not spec.tie_word_embeddings:
        total += vocabulary * hidden * dtype_bytes
    root = Root(*spec.roots[0])
    counted = vocabulary * hidden * (1 if spec.tie_word_embeddings else 2)
    for index in range(spec.num_layers):
        for parts in layer_linears(spec, root, index).values():
            rows = sum(parts.rows)
            counted += rows * parts.columns
            total += linear_bytes(rows, parts.columns, method, dtype_bytes)
    # Norms, biases and routers.
    return total + (spec.num_parameters - counted) * dtype_bytes


def linear_bytes(rows: int, columns: int, method: str, dtype_bytes: int = 2) -> int:
    """Bytes of one weight [rows, columns] and its scales."""
    bits = METHODS[method].weight_bits
    if bits == 16:
        return rows * columns * dtype_bytes
    group_size = int4_group_size(columns) if bits == 4 else None
    if group_size is None:
        return rows * columns + rows * _SCALE
    per_group = _SCALE if method == "nf4" else _SCALE + _ZERO
    return rows * columns // 2 + rows * (columns // group_size) * per_group
