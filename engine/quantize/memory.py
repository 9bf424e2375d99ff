"""Bytes that a model's weights should take, from its sizes and its method alone.

What `Decoder.nbytes` reports is checked against this, and a search can tell what fits before
anything is loaded.
"""

from __future__ import annotations

from engine.models.spec import DecoderSpec
from engine.models.tensors import Root, layer_linears
from engine.quantize.weight_size import linear_bytes


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
