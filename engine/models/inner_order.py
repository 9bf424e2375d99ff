"""The inner features of an MLP in the order that its last layer was quantized in.

GPTQ with `desc_act` groups the columns of a layer by their weight in the result, so that a group
lies scattered and ranks would cut every one. Inner features have no order of their own: sorted by
group, in the rows of gate and up as in the columns of down, each rank's are whole groups. (The
columns of the attention's output are heads, which cannot be sorted so.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.models.tensors import LinearParts
from engine.quantize.forms import IntGroupForm, LinearForm, has_path, take_rows


@dataclass(frozen=True, slots=True)
class InnerOrder:
    """An MLP whose last layer, `prefix`, is `down` as it is stored.

    `order` is that of its inner features, int64 [inner]; None where they stay as they are.
    """

    source: TensorSource
    prefix: str
    down: LinearForm
    order: Tensor | None

    @classmethod
    def of(cls, source: TensorSource, down: LinearParts) -> InnerOrder:
        """The order for an MLP's last layer.

        Raises:
            ModelError: the layer cannot be read.
        """
        prefix = down.prefixes[0]
        form = source.linear(prefix, (down.rows[0], down.columns))
        if not isinstance(form, IntGroupForm) or form.g_idx is None or not has_path(form):
            return cls(source, prefix, form, None)
        order = torch.argsort(form.g_idx, stable=True)
        q, scales, zeros = form.q[:, order], form.scales, form.zeros
        sorted_form = IntGroupForm(q, scales, zeros, form.group_size, form.bits)
        return cls(source, prefix, sorted_form, order)

    def form(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """A layer of this MLP with its inner features in order.

        Raises:
            ModelError: the layer cannot be read.
        """
        if prefix == self.prefix:
            return self.down
        form = self.source.linear(prefix, shape)
        return form if self.order is None else take_rows(form, self._rows(shape[0]))

    def bias(self, bias: Tensor) -> Tensor:
        """The bias of gate, up, or both stacked with its features in order."""
        return bias if self.order is None else bias[self._rows(len(bias))]

    def _rows(self, count: int) -> Tensor:
        assert self.order is not None
        starts = range(0, count, len(self.order))
        return torch.cat([self.order + start for start in starts])
