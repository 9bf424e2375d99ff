"""AWQ and SmoothQuant: the function stays, the scales follow their papers, errors shrink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantize.awq import AwqOptions, quantize_clipped, scales_of, search_scales
from engine.quantize.forms import dequantize
from engine.quantize.rtn import quantize_groups, quantize_int8
from engine.quantize.smoothquant import smoothing_scales


def layer(seed: int, outliers: float = 30.0) -> tuple[list[Tensor], Tensor]:
    """Two layers that share inputs of which a few channels are large, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 128, generator=generator)
    x[:, torch.randperm(128, generator=generator)[:4]] *= outliers
    weights = [torch.randn(n, 128, generator=generator) for n in (48, 16)]
    return weights, x


def output_error(weights: list[Tensor], rounded: list[Tensor], x: Tensor) -> float:
    changes = torch.cat(rounded).double() - torch.cat(weights).double()
    return float((x.double() @ changes.T).square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_awq_loses_no_more_than_rounding_to_nearest(symmetric: bool, clip: bool) -> None:
    for seed in range(3):
        weights, x = layer(seed)
        options = AwqOptions(symmetric=symmetric, clip=clip)
        gram = x.T @ x
        scales = search_scales(weights, gram, x.abs().mean(0), options)
        scaled_gram = gram / scales / scales[:, None]
        forms = [quantize_clipped(w * scales, scaled_gram, options) for w in weights]
        ours = output_error(weights, [dequantize(f) / scales for f in forms], x)
        nearest = [dequantize(quantize_groups(w, 64, 4, symmetric)) for w in weights]
        assert ours < 0.8 * output_error(weights, nearest, x)


def test_awq_scales_are_the_best_power_of_the_grid() -> None:
    weights, x = layer(7)
    options = AwqOptions(steps=4)
    mean_abs = x.abs().mean(0)
    found = search_scales(weights, x.T @ x, mean_abs, options)
    candidates = [torch.ones(128), *(scales_of(mean_abs, step / 4) for step in range(1, 5))]
    errors = []
    for scales in candidates:
        rounded = [dequantize(quantize_groups(w * scales, 64, 4)) / scales for w in weights]
        errors.append(output_error(weights, rounded, x))
    assert torch.equal(found, candidates[errors.index(min(errors))])


def test_awq_leaves_alone_what_scaling_does_not_help() -> None:
    weights, _ = layer(8)
    scales = search_scales(weights, torch.eye(128), torch.ones(128), AwqOptions())
    assert torch.equal(scales, torch.ones(128))


def test_awq_scales_are_of_even_size_and_spare_dead_channels() -> None:
    mean_abs = torch.tensor([0.0, 1e-9, 0.5, 2.0, 8.0])
    scales = scales_of(mean_abs, 0.5)
    assert float(scales[0]) == 1.0
    assert float(scales[4] / scales[3]) == pytest.approx(2.0)
    assert float(scales[1:].amax() * scales[1:].amin()) == pytest.approx(1.0)
    assert bool(torch.isfinite(scales).all())
    assert torch.equal(scales_of(torch.zeros(5), 0.5), torch.ones(5))


def test_smoothquant_scales_are_those_of_equation_4() -> None:
    weights, x = layer(9)
    largest = x.abs().amax(0)
    scales = smoothing_scales(weights, largest, 0.75)
    column = torch.cat(weights).double().abs().amax(0)
    expected = largest.double() ** 0.75 / column**0.25
    torch.testing.assert_close(scales.double(), expected, rtol=1e-5, atol=0)
    # Half the strength: activations and weights get the same range by channel.
    even = smoothing_scales(weights, largest, 0.5)
    torch.testing.assert_close(largest / even, column.float() * even, rtol=1e-4, atol=0)


def test_smoothquant_keeps_the_product_and_lowers_the_error_of_int8() -> None:
    weights, x = layer(10, outliers=80.0)
    scales = smoothing_scales(weights, x.abs().amax(0)).double()
    w, wide = torch.cat(weights).double(), x.double()
    torch.testing.assert_close((wide / scales) @ (w * scales).T, wide @ w.T)

    def rounded_product(inputs: Tensor, weight: Tensor) -> Tensor:
        step = inputs.abs().amax(1, keepdim=True) / 127
        q, channel = quantize_int8(weight)
        return (inputs / step).round() * step @ (q.double() * channel.double()[:, None]).T

    exact = wide @ w.T
    smooth = (rounded_product(wide / scales, w * scales) - exact).norm()
    assert float(smooth) < 0.5 * float((rounded_product(wide, w) - exact).norm())


def test_smoothquant_spares_dead_channels() -> None:
    weights, x = layer(11)
    x[:, 3] = 0
    weights = [w.index_fill(1, torch.tensor([5]), 0.0) for w in weights]
    scales = smoothing_scales(weights, x.abs().amax(0))
    assert float(scales[3]) == float(scales[5]) == 1.0
    assert bool(torch.isfinite(scales).all())
