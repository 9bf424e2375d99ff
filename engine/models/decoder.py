"""The decoder: pre-norm attention and gated MLP blocks over a paged KV cache.

Weights are plain tensors in the kernels' layouts and the forward pass is plain function calls: at
batch 1 a step of a small model takes milliseconds, and module dispatch would be felt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.rope import cos_sin_table
from engine.models.spec import DecoderSpec
from kernels import ops
from kernels.ops import AttentionMetadata, DenseWeight, LayerCache, LinearWeight


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; query, key and value are fused, and so are gate and up."""

    input_norm: Tensor
    qkv: LinearWeight
    output: LinearWeight
    post_attention_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        matrices = (self.qkv, self.output, self.gate_up, self.down)
        norms = (self.input_norm, self.post_attention_norm)
        return sum(m.nbytes for m in matrices) + sum(n.nbytes for n in norms)


class Decoder:
    """One loaded model.

    `embedding` may be the very object that `head` is (tied weights, held once).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: DenseWeight,
        layers: Sequence[Layer],
        final_norm: Tensor,
        head: LinearWeight,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.embedding = embedding
        self.layers = list(layers)
        self.final_norm = final_norm
        self.head = head
        self.dtype = dtype
        self.device = device
        self._cos_sin = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, a shared one counted once."""
        head = 0 if self.head is self.embedding else self.head.nbytes
        embeddings = self.embedding.nbytes + head + self.final_norm.nbytes
        return sum(layer.nbytes for layer in self.layers) + embeddings

    def set_max_position(self, num_positions: int) -> None:
        """Make the rotary table for positions below `num_positions`."""
        table = cos_sin_table(self.spec.rope, self.spec.head_dim, num_positions)
        self._cos_sin = table.to(self.device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        metadata: Sequence[AttentionMetadata],
    ) -> Tensor:
        """Hidden states after the last norm, and the new keys and values into the caches.

        token_ids, positions: int64 [T]; caches and metadata: one per layer, as `kernels.ops` wants
        them. Layers may share a metadata, and those of different block groups may share a cache.
        Returns [T, hidden] in the model's dtype.
        """
        spec = self.spec
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        eps, scale = spec.rms_norm_eps, head_dim**-0.5
        windows = spec.layer_windows
        num_tokens = token_ids.shape[0]
        residual = ops.embedding(token_ids, self.embedding)
        x = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            qkv = ops.linear(x, layer.qkv).view(num_tokens, -1, head_dim)
            q = qkv.narrow(1, 0, heads)
            k = qkv.narrow(1, heads, kv_heads)
            v = qkv.narrow(1, heads + kv_heads, kv_heads)
            q, k = ops.rotary_embedding(q, k, positions, self._cos_sin)
            ops.write_kv(k, v, caches[index], metadata[index].slots)
            attended = ops.paged_attention(q, caches[index], metadata[index], scale, windows[index])
            x = ops.linear(attended.reshape(num_tokens, heads * head_dim), layer.output)
            x, residual = ops.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = ops.silu_and_mul(ops.linear(x, layer.gate_up))
            x = ops.linear(x, layer.down)
            norm = self.final_norm if index == last else self.layers[index + 1].input_norm
            x, residual = ops.add_rms_norm(x, residual, norm, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary; hidden [S, hidden] -> [S, vocabulary] in the model's dtype."""
        return ops.linear(hidden, self.head)
