"""GPTQ against optimal brain quantization written column by column in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.quantize.forms import dequantize
from engine.quantize.gptq import GptqOptions, inverse_factor, quantize_gptq
from engine.quantize.rtn import quantize_groups


def problem(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Weights, and inputs whose columns are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.4 + torch.eye(columns)
    sizes = torch.rand(columns, generator=generator) * 3 + 0.05
    x = torch.randn(tokens, columns, generator=generator) @ mixing * sizes
    return torch.randn(rows, columns, generator=generator), x


def naive(
    weight: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor, size: int, order: list[int]
) -> Tensor:
    """Round one column; solve for the best change of all others; repeat. float64, O(K^4)."""
    w = weight.double().clone()
    hessian = 2 * gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    q = torch.zeros_like(w)
    for step, j in enumerate(order):
        s, z = scales[:, j // size].double(), zeros[:, j // size].double()
        q[:, j] = torch.round(w[:, j] / s + z).clamp(0, 15)
        error = (q[:, j] - z) * s - w[:, j]
        rest = order[step + 1 :]
        if rest:
            # argmin_d (d, e) H (d, e)^T with e fixed: d = -e H_jR H_RR^-1.
            block = hessian[rest][:, rest]
            change = torch.linalg.solve(block, hessian[rest, j])
            w[:, rest] -= error[:, None] * change
    return q


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("block_columns", [5, 16, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_column_by_column_optimum(
    activation_order: bool, block_columns: int, symmetric: bool
) -> None:
    weight, x = problem(1, 7, 48, 200)
    gram = x.T @ x
    options = GptqOptions(
        group_size=16,
        symmetric=symmetric,
        block_columns=block_columns,
        activation_order=activation_order,
    )
    form = quantize_gptq(weight, gram, options)
    order = list(range(48))
    if activation_order:
        order.sort(key=lambda j: -float(gram[j, j]))
    expected = naive(weight, gram, form.scales, form.zeros, 16, order)
    # Float32 against float64 may disagree on a tie, and then on what follows in that row.
    same = (form.q == expected).all(dim=1)
    assert int(same.sum()) >= 6


@pytest.mark.parametrize("size", [16, 24, 48])
@pytest.mark.parametrize("block_columns", [8, 20, 48])
def test_grids_made_on_the_way_do_not_depend_on_blocks(size: int, block_columns: int) -> None:
    weight, x = problem(2, 9, 48, 300)
    gram = x.T @ x
    plain = GptqOptions(group_size=size, activation_order=False, search=False, block_columns=48)
    blocked = GptqOptions(
        group_size=size, activation_order=False, search=False, block_columns=block_columns
    )
    a, b = quantize_gptq(weight, gram, plain), quantize_gptq(weight, gram, blocked)
    torch.testing.assert_close(a.scales, b.scales, rtol=1e-4, atol=1e-5)
    assert float((a.q == b.q).float().mean()) > 0.99
    # The first group saw no correction yet.
    torch.testing.assert_close(a.scales[:, 0], quantize_groups(weight, size, 4).scales[:, 0])


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("activation_order", [False, True])
def test_output_error_is_well_below_rounding_to_nearest(
    search: bool, activation_order: bool
) -> None:
    weight, x = problem(3, 64, 128, 1000)
    options = GptqOptions(search=search, activation_order=activation_order)
    form = quantize_gptq(weight, x.T @ x, options)
    nearest = quantize_groups(weight, 64, 4)
    ours = ((dequantize(form) - weight) @ x.T).norm()
    theirs = ((dequantize(nearest) - weight) @ x.T).norm()
    assert float(ours) < 0.75 * float(theirs)


def test_uncorrelated_inputs_leave_nothing_to_make_up() -> None:
    weight, _ = problem(4, 8, 64, 1)
    options = GptqOptions(damping=0.0, search=False, activation_order=False)
    form = quantize_gptq(weight, torch.eye(64) * 7, options)
    nearest = quantize_groups(weight, 64, 4)
    assert torch.equal(form.q, nearest.q)
    assert torch.equal(form.scales, nearest.scales)


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    weight, x = problem(5, 8, 64, 500)
    x[:, [3, 40]] = 0
    options = GptqOptions(search=False, activation_order=True)
    form = quantize_gptq(weight, x.T @ x, options)
    nearest = quantize_groups(weight, 64, 4)
    assert torch.equal(form.q[:, [3, 40]], nearest.q[:, [3, 40]])
    silent = quantize_gptq(weight, torch.zeros(64, 64), options)
    assert torch.equal(silent.q, nearest.q)


def test_fewer_rows_than_columns() -> None:
    weight, x = problem(6, 8, 64, 10)
    form = quantize_gptq(weight, x.T @ x, GptqOptions())
    nearest = quantize_groups(weight, 64, 4)
    ours = ((dequantize(form) - weight) @ x.T).norm()
    assert float(ours) < 0.3 * float(((dequantize(nearest) - weight) @ x.T).norm())


def test_factor_is_of_the_inverse() -> None:
    _, x = problem(7, 1, 40, 400)
    gram = x.T @ x
    upper = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(40).double(), rtol=0, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_bad_input_is_refused() -> None:
    weight, x = problem(8, 4, 64, 100)
    gram = x.T @ x
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_gptq(weight.index_fill(1, torch.tensor([3]), float("nan")), gram, GptqOptions())
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_gptq(weight, gram * float("inf"), GptqOptions())
    with pytest.raises(ValueError, match="groups that divide 64"):
        quantize_gptq(weight, gram, GptqOptions(group_size=48))
    with pytest.raises(ValueError, match="needs a gram of 64 x 64"):
        quantize_gptq(weight, gram[:5, :5], GptqOptions())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    outlier=st.floats(-1e12, 1e12),
    constant=st.floats(-8, 8, width=16),
    symmetric=st.booleans(),
    activation_order=st.booleans(),
    search=st.booleans(),
)
def test_in_range_and_finite_with_zero_constant_and_huge_weights(
    seed: int,
    outlier: float,
    constant: float,
    symmetric: bool,
    activation_order: bool,
    search: bool,
) -> None:
    weight, x = problem(seed, 5, 32, 60)
    weight[1] = 0.0
    weight[2] = constant
    weight[3, 7] = outlier
    x[:, 4] = 0.0
    options = GptqOptions(
        group_size=16, symmetric=symmetric, activation_order=activation_order, search=search
    )
    form = quantize_gptq(weight, x.T @ x, options)
    assert form.q.dtype == torch.uint8
    assert int(form.q.max()) <= 15
    restored = dequantize(form)
    assert bool(torch.isfinite(restored).all())
    assert bool((restored[1] == 0).all())
    # A group never leaves the range of its own weights by more than a step.
    assert bool((restored.abs() <= 1.2 * form.scales.repeat_interleave(16, 1) * 15).all())


def test_what_must_not_be_kept_is_zero_and_made_up_for() -> None:
    weight, x = problem(9, 32, 64, 600)
    keep = torch.rand(32, 64, generator=torch.Generator().manual_seed(10)) > 0.4
    pruned = torch.where(keep, weight, torch.zeros(()))
    form = quantize_gptq(pruned, x.T @ x, GptqOptions(), keep)
    restored = dequantize(form)
    assert bool((restored[~keep] == 0).all())
    nearest = dequantize(quantize_groups(pruned, 64, 4))
    ours, theirs = (((w - pruned) @ x.T).norm() for w in (restored, nearest))
    assert float(ours) < float(theirs)


def test_damping_grows_until_the_moments_can_be_inverted() -> None:
    # Float32 sums of nearly equal columns may even have slightly negative eigenvalues.
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(11)).expand(50, 16)
    gram = x.T @ x - 1e-3 * torch.eye(16)
    upper = inverse_factor(gram, 0.0)
    assert bool(torch.isfinite(upper).all())
    assert bool((upper.diagonal() > 0).all())
