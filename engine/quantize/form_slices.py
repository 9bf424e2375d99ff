"""Rows and columns of a weight in whatever form it is, by the scales of the whole.

Where a cut falls inside a group or a block, the groups become as small as the cut needs and share
their scale: the values stay exactly what they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.quantize.forms import (
    DenseForm,
    Fp8Form,
    Int8ChannelForm,
    IntGroupForm,
    LinearForm,
    TableForm,
    dequantize,
    stack,
)

# Below it a group's scale takes more memory than is saved.
_SMALLEST_GROUP = 8


def take_runs(form: LinearForm, runs: Sequence[tuple[int, int]]) -> LinearForm:
    """The rows of the runs (start, stop), in order; views where one run is taken.

    Forms of runs that cannot be stacked become floats.
    """
    edges = [edge for run in runs for edge in run if edge < form.shape[0]]
    found = [_rows(form, start, stop, edges) for start, stop in runs]
    stacked = stack(found)
    return stacked or DenseForm(torch.cat([dequantize(part) for part in found]))


def take_columns(form: LinearForm, start: int, stop: int) -> LinearForm:
    """The columns from `start` up to `stop`; views where possible.

    Columns whose groups lie anywhere (`g_idx`) and are cut become floats: a kernel's groups are of
    one size. So do groups that the cut would leave fewer than 8 columns.
    """
    if isinstance(form, DenseForm):
        return DenseForm(form.weight[:, start:stop])
    if isinstance(form, Int8ChannelForm):
        return Int8ChannelForm(form.q[:, start:stop], form.scales, form.outlier_threshold)
    if isinstance(form, Fp8Form):
        return _fp8_columns(form, start, stop)
    if isinstance(form, IntGroupForm) and form.g_idx is not None:
        return _scattered_columns(form, start, stop)
    size = math.gcd(form.group_size, start, stop)
    if size < min(_SMALLEST_GROUP, form.group_size):
        return DenseForm(dequantize(form)[:, start:stop])
    scales = _spread(form.scales, form.group_size, size, start, stop)
    q = form.q[:, start:stop]
    if isinstance(form, TableForm):
        return TableForm(q, scales, form.table, size)
    zeros = _spread(form.zeros, form.group_size, size, start, stop)
    return IntGroupForm(q, scales, zeros, size, form.bits)


def _rows(form: LinearForm, start: int, stop: int, edges: Sequence[int]) -> LinearForm:
    """The rows from `start` up to `stop`, as views; blocks end at all `edges`."""
    if isinstance(form, DenseForm):
        return DenseForm(form.weight[start:stop])
    if isinstance(form, Int8ChannelForm):
        return Int8ChannelForm(form.q[start:stop], form.scales[start:stop], form.outlier_threshold)
    if isinstance(form, IntGroupForm):
        scales, zeros = form.scales[start:stop], form.zeros[start:stop]
        return IntGroupForm(
            form.q[start:stop], scales, zeros, form.group_size, form.bits, form.g_idx
        )
    if isinstance(form, TableForm):
        return TableForm(form.q[start:stop], form.scales[start:stop], form.table, form.group_size)
    scales, block = form.scales, form.block_shape
    if block is not None:
        rows = math.gcd(block[0], *edges)
        scales = scales.repeat_interleave(block[0] // rows, 0)[start // rows : -(-stop // rows)]
        block = (rows, block[1])
    elif scales.numel() > 1:
        scales = scales[start:stop]
    return Fp8Form(form.data[start:stop], scales, block, form.activations, form.input_scale)


def _fp8_columns(form: Fp8Form, start: int, stop: int) -> Fp8Form:
    scales, block = form.scales, form.block_shape
    if block is not None:
        columns = math.gcd(block[1], start, stop if stop < form.shape[1] else 0)
        scales = scales.repeat_interleave(block[1] // columns, 1)
        scales = scales[:, start // columns : -(-stop // columns)]
        block = (block[0], columns)
    return Fp8Form(form.data[:, start:stop], scales, block, form.activations, form.input_scale)


def _scattered_columns(form: IntGroupForm, start: int, stop: int) -> LinearForm:
    """Columns of groups by `g_idx`, which keep integers where whole groups are taken."""
    assert form.g_idx is not None
    here = form.g_idx[start:stop]
    groups, inverse, counts = torch.unique(here, return_inverse=True, return_counts=True)
    if not bool((counts == form.group_size).all()):
        return DenseForm(dequantize(form)[:, start:stop])
    return IntGroupForm(
        form.q[:, start:stop],
        form.scales[:, groups],
        form.zeros[:, groups],
        form.group_size,
        form.bits,
        inverse,
    )


def _spread(values: Tensor, group: int, size: int, start: int, stop: int) -> Tensor:
    """Values by groups of `group` columns, given to groups of `size` from `start` up to `stop`."""
    return values.repeat_interleave(group // size, 1)[:, start // size : stop // size]
