"""The decoder: embeddings, blocks over a paged KV cache, a norm and an output head.

Weights are plain tensors in the kernels' layouts and the forward pass is plain function calls: at
batch 1 a step of a small model takes milliseconds, and module dispatch would be felt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.block import Layer, run_block
from engine.models.rope import layer_tables
from engine.models.sharding import Shard
from engine.models.spec import DecoderSpec
from engine.parallel import ALONE, Ranks
from kernels import ops
from kernels.ops import AttentionMetadata, DenseWeight, LayerCache, LinearWeight


class Decoder:
    """One loaded model, or the part of it that one of `ranks` has.

    `spec` is that part's: its heads and inner features, and the whole vocabulary. `embedding` may
    be the very object that `head` is (tied weights, held once). `rotary_tables` has the table of
    each layer once `set_max_position` was called. `notes` are sentences on what is held otherwise
    than it is stored.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.spec = spec
        self.ranks = ranks
        self.embedding = embedding
        self.layers = list(layers)
        self.final_norm = final_norm
        self.head = head
        self.dtype = dtype
        self.device = device
        self.rotary_tables: list[Tensor] = []
        self.notes: list[str] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, a shared one counted once."""
        head = 0 if self.head is self.embedding else self.head.nbytes
        embeddings = self.embedding.nbytes + head + self.final_norm.nbytes
        return sum(layer.nbytes for layer in self.layers) + embeddings

    def set_max_position(self, num_positions: int) -> None:
        """Make the rotary tables for positions below `num_positions`."""
        self.rotary_tables = layer_tables(self.spec, num_positions, self.device)

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
        spec, tables = self.spec, self.rotary_tables
        residual = embed(spec, self.embedding, token_ids, self.ranks)
        x = None
        for index, layer in enumerate(self.layers):
            x, residual = run_block(
                spec,
                index,
                layer,
                x,
                residual,
                positions,
                tables[index],
                caches[index],
                metadata[index],
                ranks=self.ranks,
            )
        assert x is not None
        return ops.add_rms_norm(x, residual, self.final_norm, spec.rms_norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary; hidden [S, hidden] -> [S, vocabulary] in the model's dtype.

        Every rank gets all of them.
        """
        scores = ops.linear(hidden, self.head)
        if self.ranks.size > 1:
            size = self.spec.vocab_size
            each = Shard(self.ranks.rank, self.ranks.size).vocabulary_rows(size)
            # The last rank may have fewer rows than the others.
            scores = self.ranks.gather(F.pad(scores, (0, each - scores.shape[1])), size)
        cap = self.spec.logit_soft_cap
        return ops.soft_cap(scores, cap) if cap else scores


def embed(
    spec: DecoderSpec, embedding: DenseWeight, token_ids: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """The first residual; token_ids int64 [T] -> [T, hidden], memory of its own."""
    if ranks.size > 1:
        # One rank has a token's row and the others add zeros, which is exact.
        own = Shard(ranks.rank, ranks.size).vocabulary(spec.vocab_size)
        foreign = (token_ids < own.start) | (token_ids >= own.stop)
        rows = ops.embedding((token_ids - own.start).masked_fill(foreign, 0), embedding)
        rows = ranks.all_reduce(rows.masked_fill(foreign[:, None], 0.0))
    else:
        rows = ops.embedding(token_ids, embedding)
    if spec.embedding_scale != 1.0:
        # The scale is rounded before it multiplies, as the model was trained: sqrt(3072) is 55.5.
        rows *= torch.tensor(spec.embedding_scale, dtype=rows.dtype)
    return rows
