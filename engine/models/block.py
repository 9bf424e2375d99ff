"""One block of the decoder: attention over the paged cache, then an MLP or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.models.experts import Experts, gated, run_experts
from engine.models.spec import DecoderSpec
from engine.parallel import ALONE, Ranks
from kernels import ops
from kernels.ops import AttentionMetadata, LayerCache, LinearWeight

# Told the name of a linear layer and its input rows [T, K]; see `engine.models.tensors`.
Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Mlp:
    """Weights of a gated MLP, gate and up fused."""

    gate_up: LinearWeight
    down: LinearWeight

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; query, key and value are fused.

    `input_norm` and `mlp_norm` stand before attention and MLP, the two `output` norms behind them
    and `query_norm` and `key_norm` [head_dim] on each head, in families that have them. Weights of
    norms are the factors themselves, float32 where the checkpoint stores differences from 1.
    """

    input_norm: Tensor
    qkv: LinearWeight
    output: LinearWeight
    mlp_norm: Tensor
    mlp: Mlp | Experts
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    attention_output_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        norms = (
            self.input_norm,
            self.mlp_norm,
            self.query_norm,
            self.key_norm,
            self.attention_output_norm,
            self.mlp_output_norm,
        )
        matrices = self.qkv.nbytes + self.output.nbytes + self.mlp.nbytes
        return matrices + sum(norm.nbytes for norm in norms if norm is not None)


def run_block(
    spec: DecoderSpec,
    index: int,
    layer: Layer,
    x: Tensor | None,
    residual: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    observe: Observer | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """One block over T tokens: its output and the residual that it is yet to be added to.

    x [T, hidden] is what the block before returned, None for the first; the hidden state between
    two blocks is `residual + x`, added where the next norm reads it. `residual` is changed in
    place. positions int64 [T]; cos_sin is the layer's rotary table, cache and metadata are its own.
    `observe` is called with the input of each linear layer. `spec` and `layer` are this rank's part
    of the block (`engine.models.sharding`), of which `ranks` have the others.
    """
    eps = spec.rms_norm_eps
    heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if x is None:
        x = ops.rms_norm(residual, layer.input_norm, eps)
    else:
        x, residual = ops.add_rms_norm(x, residual, layer.input_norm, eps)
    num_tokens = x.shape[0]
    if observe is not None:
        observe("qkv", x)
    qkv = ops.linear(x, layer.qkv).view(num_tokens, -1, head_dim)
    q = qkv.narrow(1, 0, heads)
    k = qkv.narrow(1, heads, kv_heads)
    v = qkv.narrow(1, heads + kv_heads, kv_heads)
    norms = None
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = ops.HeadNorms(layer.query_norm, layer.key_norm, eps)
    ops.rotary_and_write_kv(q, k, v, positions, cos_sin, cache, metadata.slots, norms)
    x = ops.paged_attention(
        q,
        cache,
        metadata,
        spec.attention_scale,
        spec.layer_windows[index],
        spec.attention_soft_cap,
    ).reshape(num_tokens, heads * head_dim)
    if observe is not None:
        observe("output", x)
    x = ranks.all_reduce(ops.linear(x, layer.output))
    if layer.attention_output_norm is not None:
        x = ops.rms_norm(x, layer.attention_output_norm, eps)
    x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
    x = ranks.all_reduce(run_mlp(spec, layer.mlp, x, observe))
    if layer.mlp_output_norm is not None:
        x = ops.rms_norm(x, layer.mlp_output_norm, eps)
    return x, residual


def run_mlp(spec: DecoderSpec, mlp: Mlp | Experts, x: Tensor, observe: Observer | None) -> Tensor:
    """The MLP or the experts of a block; x [T, hidden] -> [T, hidden]."""
    if not isinstance(mlp, Mlp):
        return run_experts(spec, mlp, x, observe)
    if observe is not None:
        observe("gate_up", x)
    x = ops.linear(x, mlp.gate_up)
    x = gated(spec, x)
    if observe is not None:
        observe("down", x)
    return ops.linear(x, mlp.down)
