"""Scaling the channels between two operations of a block, so that the function stays the same.

A linear layer's input is divided by s and the columns of its weight are multiplied. The division
costs nothing at run time where the operation before is linear in the channel:

- a norm's weight, before query, key and value and before gate and up;
- the rows of `up`, before `down`: the gate's activation multiplies what `up` gives;
- the rows of `v`, before `o`: attention only averages values. With grouped-query attention the
  query heads that share a value head share their scales.

Before a mixture of experts the norm's output also steers the router, and every expert would want
scales of its own: that one stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.errors import ModelError
from engine.models.spec import DecoderSpec
from engine.models.tensors import LinearParts, Root, layer_linears, layer_norms
from engine.quantize.forms import dequantize


@dataclass(frozen=True, slots=True)
class Fold:
    """The linear layers `consumer` (a name of `layer_linears`) and what their input comes from.

    Either the norm `norm` (a name of `layer_norms`), or the rows from `first_row` on of the
    checkpoint's linear layer `producer`. `sharing` channels of the input in turn come from one row:
    query heads that share a value head, of `head_dim` each.
    """

    consumer: str
    norm: str | None = None
    producer: str = ""
    first_row: int = 0
    sharing: int = 1
    head_dim: int = 1

    def tie(self, values: Tensor, largest: bool = False) -> Tensor:
        """Values by input channel [K], made equal (mean, or largest) where they must be."""
        heads = values.reshape(-1, self.sharing, self.head_dim)
        tied = heads.amax(dim=1, keepdim=True) if largest else heads.mean(dim=1, keepdim=True)
        return tied.expand_as(heads).reshape(-1)

    def by_row(self, scales: Tensor) -> Tensor:
        """Of tied scales by input channel [K], those of the producer's rows."""
        return scales.reshape(-1, self.sharing, self.head_dim)[:, 0].reshape(-1)


def layer_folds(spec: DecoderSpec, linears: dict[str, LinearParts]) -> list[Fold]:
    """What can be folded in a block with these linear layers (`layer_linears`)."""
    folds = [Fold("qkv", norm="input_norm")]
    q, k = spec.qkv_sizes[:2]
    qkv = linears["qkv"].prefixes
    sharing = spec.num_heads // spec.num_kv_heads
    first = q + k if len(qkv) == 1 else 0
    folds.append(
        Fold("output", None, qkv[-1], first, sharing, spec.head_dim),
    )
    if "gate_up" in linears:
        folds.append(Fold("gate_up", norm="mlp_norm"))
    for name, parts in linears.items():
        if name.endswith("gate_up"):
            first = sum(parts.rows) // 2 if len(parts.prefixes) == 1 else 0
            folds.append(
                Fold(name.removesuffix("gate_up") + "down", None, parts.prefixes[-1], first)
            )
    return folds


class LayerFloats:
    """One block's float weights, to be scaled in place; everything else stays in `source`.

    `weights`: float32 [N, K] by the prefix of the checkpoint's linear layer. `changed`: float
    tensors of the checkpoint that folding changed, by name and in the dtype they are stored in.
    """

    def __init__(
        self, source: TensorSource, spec: DecoderSpec, index: int, device: torch.device
    ) -> None:
        root = Root.find(spec, source)
        self.linears = layer_linears(spec, root, index)
        self.weights: dict[str, Tensor] = {}
        self.changed: dict[str, Tensor] = {}
        self._source = source
        self._spec = spec
        self._norms = layer_norms(spec, root, index)
        for parts in self.linears.values():
            for prefix, rows in zip(parts.prefixes, parts.rows, strict=True):
                form = source.linear(prefix, (rows, parts.columns))
                self.weights[prefix] = dequantize(form).to(device, copy=True)

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        return self._source.problem(name, text)

    def fold(self, fold: Fold, scales: Tensor) -> Tensor:
        """Multiply the consumers' columns by `scales` [K], tied, and divide what comes before.

        Returns the scales as applied: a norm's weight is stored in few bits, and what its rounding
        took is given back to the columns.
        """
        if fold.norm is not None:
            scales = self._divide_norm(fold.norm, scales)
        else:
            self._divide_rows(fold, fold.by_row(scales))
        for prefix in self.linears[fold.consumer].prefixes:
            self.weights[prefix] *= scales
        return scales

    def _divide_norm(self, field: str, scales: Tensor) -> Tensor:
        name, size = self._norms[field]
        stored = self.changed.get(name)
        if stored is None:
            stored = self._source.read(name, (size,))
        offset = 1.0 if self._spec.unit_norms else 0.0
        factors = stored.to(scales.device, torch.float32) + offset
        divided = (factors / scales - offset).to(stored.dtype)
        after = divided.float() + offset
        kept = (factors == 0) | (after == 0)
        self.changed[name] = torch.where(kept, stored.to(divided.device), divided)
        return torch.where(kept, torch.ones_like(scales), factors / after)

    def _divide_rows(self, fold: Fold, scales: Tensor) -> None:
        rows = slice(fold.first_row, fold.first_row + len(scales))
        self.weights[fold.producer][rows] /= scales[:, None]
        name = f"{fold.producer}.bias"
        if name in self._source:
            bias = self.changed.get(name)
            if bias is None:
                bias = self._source.read(name, (len(self.weights[fold.producer]),)).clone()
            bias[rows] = (bias[rows].to(scales.device, torch.float32) / scales).to(bias)
            self.changed[name] = bias
