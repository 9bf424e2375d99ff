"""What the weight of a linear layer can be, before any kernel lays it out.

Readers of checkpoints and quantization methods both end in one of these forms; the loader fuses
and packs them. Every form is of one matrix [N, K] = [output features, input features], unpacked to
one integer an element, so that rows can be cut, stacked and checked without knowing a file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import ops
from kernels.ops import LinearWeight
from kernels.rounding import spread_blocks

# Integers in groups are multiplied as these many bits; others lie in the next wider.
KERNEL_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class DenseForm:
    """Floats: `weight` [N, K]."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Int8ChannelForm:
    """Symmetric int8 by output channel with dynamic int8 activations (W8A8).

    `w = q * scales[:, None]`; q int8 [N, K], scales float32 [N]. Elements of an activation row at
    or above `outlier_threshold` in magnitude are multiplied in floating point (LLM.int8()); 0 turns
    that off.
    """

    q: Tensor
    scales: Tensor
    outlier_threshold: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]


@dataclass(frozen=True, slots=True)
class IntGroupForm:
    """Integers in groups along K, activations in floating point (weight-only).

    `w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]`; q uint8 [N, K] in 0 .. 2**bits - 1 (a
    symmetric 4-bit weight has zeros of 8), scales and zeros float32 [N, groups]. g is
    `k // group_size`, or `g_idx[k]` (int64 [K]) where columns were quantized in another order.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    bits: int
    g_idx: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]


@dataclass(frozen=True, slots=True)
class Fp8Form:
    """FP8 e4m3: `w = data * scale`; data float8_e4m3fn [N, K].

    `scales` is float32: [1] for the tensor, [N] by channel, or by blocks of `block_shape` (rows,
    columns) [ceil(N / rows), ceil(K / columns)]. `activations`: "none" leaves them in floating
    point; "dynamic" rounds each row to e4m3 by its own maximum (by blocks of `block_shape[1]`
    columns where the weight has blocks); "static" rounds them by `input_scale` (float32 [1]).
    """

    data: Tensor
    scales: Tensor
    block_shape: tuple[int, int] | None = None
    activations: Literal["none", "dynamic", "static"] = "dynamic"
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.data.shape[0], self.data.shape[1]


@dataclass(frozen=True, slots=True)
class TableForm:
    """Four bits that look up a table of 16 floats, scaled in groups along K, as NF4 does.

    `w[n, k] = table[q[n, k]] * scales[n, k // group_size]`; q uint8 [N, K], scales float32
    [N, K / group_size], table float32 [16].
    """

    q: Tensor
    scales: Tensor
    table: Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]


LinearForm = DenseForm | Int8ChannelForm | IntGroupForm | Fp8Form | TableForm


def dequantize(form: LinearForm) -> Tensor:
    """The weight that a form stands for, float32 [N, K], each formula in float32."""
    if isinstance(form, DenseForm):
        return form.weight.float()
    if isinstance(form, Int8ChannelForm):
        return form.q.float() * form.scales[:, None]
    if isinstance(form, Fp8Form):
        return form.data.float() * _spread_fp8_scales(form)
    columns = form.shape[1]
    if isinstance(form, TableForm):
        values = form.table[form.q.long()]
        return values * form.scales.repeat_interleave(form.group_size, 1)[:, :columns]
    group = form.g_idx
    if group is None:
        group = torch.arange(columns, device=form.q.device) // form.group_size
    return (form.q.float() - form.zeros[:, group]) * form.scales[:, group]


def take_rows(form: LinearForm, index: Tensor) -> LinearForm:
    """The form of the rows `index` (int64), in that order.

    An FP8 weight in blocks becomes floats unless `index` is a run of whole blocks, since a block's
    rows share a scale by where they lie.
    """
    if isinstance(form, DenseForm):
        return DenseForm(form.weight[index])
    if isinstance(form, Int8ChannelForm):
        return Int8ChannelForm(form.q[index], form.scales[index], form.outlier_threshold)
    if isinstance(form, IntGroupForm):
        return IntGroupForm(
            form.q[index],
            form.scales[index],
            form.zeros[index],
            form.group_size,
            form.bits,
            form.g_idx,
        )
    if isinstance(form, TableForm):
        return TableForm(form.q[index], form.scales[index], form.table, form.group_size)
    data = form.data.view(torch.uint8)[index].view(torch.float8_e4m3fn)
    scales = form.scales
    if form.block_shape is not None:
        rows = form.block_shape[0]
        first = int(index[0])
        run = torch.arange(first, first + len(index), device=index.device)
        if first % rows or not torch.equal(index, run):
            return DenseForm(dequantize(form)[index])
        scales = scales[first // rows : -(-(first + len(index)) // rows)]
    elif scales.numel() > 1:
        scales = scales[index]
    return Fp8Form(data, scales, form.block_shape, form.activations, form.input_scale)


def stack(forms: Sequence[LinearForm]) -> LinearForm | None:
    """One form of the rows of all, in order; None if they do not share one layout of columns."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if all(isinstance(form, DenseForm) for form in forms):
        return DenseForm(torch.cat([f.weight for f in forms if isinstance(f, DenseForm)]))
    if isinstance(first, Int8ChannelForm):
        return _stack_int8([f for f in forms if isinstance(f, Int8ChannelForm)], len(forms))
    if isinstance(first, IntGroupForm):
        return _stack_groups([f for f in forms if isinstance(f, IntGroupForm)], len(forms))
    if isinstance(first, Fp8Form):
        return _stack_fp8([f for f in forms if isinstance(f, Fp8Form)], len(forms))
    if isinstance(first, TableForm):
        return _stack_tables([f for f in forms if isinstance(f, TableForm)], len(forms))
    return None


def pack(forms: Sequence[LinearForm], bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    """Lay out the stacked rows of `forms` for `kernels.ops.linear`.

    bias [sum of N] or None. `dtype` is the model's: floats are stored in it, and so is a form for
    which there is no matmul, after `dequantize`. Forms that cannot be stacked become one weight of
    several parts.
    """
    form = stack(forms)
    if form is not None:
        return _pack_one(form, bias, dtype)
    biases = [None] * len(forms) if bias is None else torch.split(bias, [f.shape[0] for f in forms])
    return ops.concat(
        [_pack_one(part, added, dtype) for part, added in zip(forms, biases, strict=True)]
    )


def has_path(form: LinearForm) -> bool:
    """Whether the kernels multiply by this form exactly; if not, `pack` makes floats of it."""
    if isinstance(form, IntGroupForm):
        narrow = form.bits <= KERNEL_BITS[0]
        if form.bits > KERNEL_BITS[-1] or (narrow and form.shape[1] % 2):
            return False  # four bits lie two to a byte
        return form.shape[1] % form.group_size == 0 and _groups_are_whole(form)
    if isinstance(form, TableForm):
        return form.shape[1] % form.group_size == 0
    return True


def _pack_one(form: LinearForm, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    if isinstance(form, DenseForm):
        return ops.pack_dense(form.weight.to(dtype), bias)
    if not has_path(form):
        return ops.pack_dense(dequantize(form).to(dtype), bias)
    if isinstance(form, Int8ChannelForm):
        return ops.pack_int8(form.q, form.scales, bias, form.outlier_threshold)
    if isinstance(form, Fp8Form):
        return ops.pack_fp8(
            form.data, form.scales, bias, form.block_shape, form.activations, form.input_scale
        )
    if isinstance(form, TableForm):
        return ops.pack_table4(form.q, form.scales, form.table, form.group_size, bias)
    q, permutation = form.q, None
    if form.g_idx is not None:
        # Sorted by group, columns lie as the kernels want them; activations are gathered alike.
        permutation = torch.argsort(form.g_idx, stable=True)
        if torch.equal(permutation, torch.arange(len(permutation), device=permutation.device)):
            permutation = None
        else:
            q = q[:, permutation]
    # Fewer bits lie in wider integers: exact, and far smaller than floats.
    if form.bits <= KERNEL_BITS[0]:
        return ops.pack_int4(q, form.scales, form.zeros, form.group_size, bias, permutation)
    return ops.pack_int8_groups(
        (q.to(torch.int16) - 128).to(torch.int8),
        form.scales,
        form.zeros - 128,
        form.group_size,
        bias,
        permutation,
    )


def _groups_are_whole(form: IntGroupForm) -> bool:
    """Whether each group has `group_size` columns, wherever they lie."""
    if form.g_idx is None:
        return True
    sizes = torch.bincount(form.g_idx, minlength=form.scales.shape[1])
    return bool((sizes == form.group_size).all())


def _spread_fp8_scales(form: Fp8Form) -> Tensor:
    """Scales that broadcast against [N, K]."""
    if form.block_shape is None:
        return form.scales.reshape(-1, 1)
    return spread_blocks(form.scales, form.block_shape, form.shape)


def _stack_int8(forms: list[Int8ChannelForm], wanted: int) -> Int8ChannelForm | None:
    if len(forms) != wanted or len({f.outlier_threshold for f in forms}) > 1:
        return None
    q, scales = torch.cat([f.q for f in forms]), torch.cat([f.scales for f in forms])
    return Int8ChannelForm(q, scales, forms[0].outlier_threshold)


def _stack_groups(forms: list[IntGroupForm], wanted: int) -> IntGroupForm | None:
    first = forms[0]
    if len(forms) != wanted or any(
        (f.group_size, f.bits) != (first.group_size, first.bits) or not _same(f.g_idx, first.g_idx)
        for f in forms
    ):
        return None
    return IntGroupForm(
        torch.cat([f.q for f in forms]),
        torch.cat([f.scales for f in forms]),
        torch.cat([f.zeros for f in forms]),
        first.group_size,
        first.bits,
        first.g_idx,
    )


def _stack_fp8(forms: list[Fp8Form], wanted: int) -> Fp8Form | None:
    first = forms[0]
    if len(forms) != wanted or any(
        (f.block_shape, f.activations) != (first.block_shape, first.activations)
        or not _same(f.input_scale, first.input_scale)
        for f in forms
    ):
        return None
    if first.block_shape is not None:
        if any(f.shape[0] % first.block_shape[0] for f in forms[:-1]):
            return None
        scales = torch.cat([f.scales for f in forms])
    else:
        scales = torch.cat([f.scales.flatten().expand(f.shape[0]) for f in forms])
    data = torch.cat([f.data.view(torch.uint8) for f in forms]).view(torch.float8_e4m3fn)
    return Fp8Form(data, scales, first.block_shape, first.activations, first.input_scale)


def _stack_tables(forms: list[TableForm], wanted: int) -> TableForm | None:
    first = forms[0]
    if len(forms) != wanted or any(
        f.group_size != first.group_size or not torch.equal(f.table, first.table) for f in forms
    ):
        return None
    q, scales = torch.cat([f.q for f in forms]), torch.cat([f.scales for f in forms])
    return TableForm(q, scales, first.table, first.group_size)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
