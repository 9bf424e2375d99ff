"""Distributions that tokens are drawn from, against the float64 definition on fresh random rows."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import reference, sampling

VOCABULARY = 150
# (temperature, top_k, top_p, min_p): every filter alone and with others.
ROWS = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.05),
    (1.0, 7, 1.0, 0.0),
    (2.0, 0, 0.6, 0.0),
    (0.7, 20, 0.9, 0.0),
    (1.3, -1, 0.95, 0.02),
    (5.0, 100, 0.99, 0.001),
    (1.0, VOCABULARY + 9, 0.999999, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-12, 0.0),
    (1.0, 0, 1.0, 1.0),
]


def parameters_of(
    rows: list[tuple[float, int, float, float]], uniform: list[float] | None = None
) -> sampling.DrawParameters:
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*rows, strict=True))
    return sampling.DrawParameters(temperature, top_k, top_p, min_p, uniform or [0.0] * len(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [VOCABULARY, 3000])
def test_probabilities_are_the_definitions(dtype: torch.dtype, columns: int) -> None:
    """Rows of which some hold many equal logits, and some many of minus infinity."""
    logits = (torch.randn(len(ROWS), columns) * 3).to(dtype)
    logits[1::4] = logits[1::4].round()
    logits[2::4, ::3] = -math.inf
    got = sampling.probabilities(logits, parameters_of(ROWS))
    assert got.dtype == torch.float32
    for row, x, knobs in zip(got, logits, ROWS, strict=True):
        expected = reference.kept_probabilities(x.double(), *knobs)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-8)


def test_probabilities_of_greedy_rows_are_one_token() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[:, 99] = logits[:, 42] = 9.0
    rows = [(0.0, 0, 1.0, 0.0), (1.0, 3, 0.7, 0.0), (0.0, 5, 0.5, 0.1), (0.0, 0, 1.0, 0.0)]
    for mixed in (rows, rows[2:]):
        got = sampling.probabilities(logits[: len(mixed)], parameters_of(mixed))
        for row, knobs in zip(got, mixed, strict=True):
            if knobs[0] == 0.0:
                assert row.nonzero().tolist() == [[42]]
                assert float(row[42]) == 1.0
            else:
                assert row.nonzero().flatten().tolist() == [42, 99]


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_a_cold_row_is_the_likeliest(temperature: float) -> None:
    logits = torch.randn(1, VOCABULARY)
    logits[0, 17] = 9.0
    cold = parameters_of([(temperature, 0, 1.0, 0.0)], [0.999])
    assert sampling.probabilities(logits, cold)[0].nonzero().tolist() == [[17]]
    assert sampling.draw(logits, cold).tolist() == [17]


def test_a_draw_inverts_these_probabilities() -> None:
    """`draw`, and `draw_from` of the probabilities, take the token of the definition."""
    rows = ROWS * 40
    uniform = torch.rand(len(rows), dtype=torch.float64)
    logits = torch.randn(len(rows), VOCABULARY) * 2
    parameters = parameters_of(rows, uniform.tolist())
    probabilities = sampling.probabilities(logits, parameters)
    drawn = sampling.draw(logits, parameters)
    again = sampling.draw_from(probabilities, uniform)
    # Masses that do not add up to 1 are drawn from in proportion.
    halved = sampling.draw_from(probabilities * 0.5, uniform)
    assert torch.equal(again, halved)
    sums = probabilities.double().cumsum(1)
    for token, other, row, sum_, u in zip(drawn, again, probabilities, sums, uniform, strict=True):
        assert row[token] > 0
        if token != other:  # only within rounding of a border between the two
            assert abs(float(sum_[min(token, other)] - u)) < 1e-6
    assert int((drawn != again).sum()) <= 2
    assert len(drawn.unique()) > 30


def test_a_row_of_nan_gives_some_token() -> None:
    logits = torch.full((2, VOCABULARY), math.nan)
    parameters = parameters_of([(1.0, 0, 1.0, 0.0), (1.0, 3, 0.9, 0.0)])
    probabilities = sampling.probabilities(logits, parameters)
    tokens = sampling.draw_from(probabilities, torch.tensor([0.3, 0.9], dtype=torch.float64))
    assert all(0 <= token < VOCABULARY for token in tokens.tolist())
