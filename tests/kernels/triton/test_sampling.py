"""Draws of the Triton kernels against the float64 definition, on fresh random rows."""

import math

import numpy as np
import pytest
import torch

from kernels import reference, sampling
from kernels.triton import sampling as triton_sampling

VOCABULARY = 150
# Small parts, and few at once, so that a small vocabulary has many and searches in several rounds.
SMALL = {"part": 16, "parts_at_once": 4}


def draw(logits, parameters, **tiles):
    packed = torch.from_numpy(sampling.pack(parameters, logits.shape[1])).to(logits.device)
    # Numpy warns where the kernels count on infinities.
    with np.errstate(over="ignore"):
        return triton_sampling.draw(logits, packed, **(tiles or SMALL))


def parameters_of(*rows):
    """(temperature, top_k, top_p, min_p, uniform) of each row."""
    return sampling.DrawParameters(*(list(column) for column in zip(*rows, strict=True)))


def assert_drawn(token, logits, temperature, top_k, top_p, min_p, uniform):
    """That the token is the definition's, or that the draw is within rounding of a border."""
    kept = reference.kept_probabilities(logits.double().cpu(), temperature, top_k, top_p, min_p)
    sums = kept.cumsum(0)
    exact = int(torch.searchsorted(sums, torch.tensor([uniform], dtype=torch.float64), right=True))
    assert kept[token] > 0, (temperature, top_k, top_p, min_p, uniform)
    if token != exact:
        assert abs(float(sums[min(token, exact)]) - uniform) < 3e-6
    return token == exact


# Every filter alone and with others; temperatures from cold to hot.
ROWS = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.05),
    (1.0, 7, 1.0, 0.0),
    (2.0, 0, 0.6, 0.0),
    (0.7, 20, 0.9, 0.0),
    (1.3, 0, 0.95, 0.02),
    (5.0, 100, 0.99, 0.001),
    (1.0, VOCABULARY + 9, 0.999999, 0.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_the_definitions(device, dtype):
    """Random rows of which some hold many equal logits, and some many of minus infinity."""
    rows = [(*row, float(torch.rand((), dtype=torch.float64))) for row in ROWS]
    logits = torch.randn(len(rows), VOCABULARY) * 3
    logits[1::4] = logits[1::4].round()
    logits[2::4, ::3] = -math.inf
    logits = logits.to(dtype).to(device)
    tokens = draw(logits, parameters_of(*rows)).tolist()
    exact = [assert_drawn(t, x, *row) for t, x, row in zip(tokens, logits, rows, strict=True)]
    assert sum(exact) >= len(rows) - 1


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, 0.0), (1.5, 5, 0.8, 0.1)])
def test_every_part_of_the_distribution_is_hit(device, row):
    """Evenly spaced chances: each token of a small vocabulary is drawn as often as it should."""
    count = 16
    logits = torch.randn(1, 12).mul(1.5).round(decimals=1).to(device).expand(count, -1)
    rows = [(*row, (i + 0.5) / count) for i in range(count)]
    tokens = draw(logits, parameters_of(*rows), part=8, parts_at_once=2).tolist()
    for token, x, whole in zip(tokens, logits, rows, strict=True):
        assert_drawn(token, x, *whole)
    drawn = torch.bincount(torch.tensor(tokens), minlength=12) / count
    kept = reference.kept_probabilities(logits[0].double().cpu(), *row)
    assert float((drawn - kept).abs().max()) <= 1.01 / count


def test_the_likeliest(device):
    """Greedy rows, filters that keep one, a cold row: the first of the largest logits."""
    rows = [
        (0.0, 0, 1.0, 0.0, 0.9),
        (0.0, 3, 0.5, 0.2, 0.9),
        (1.0, 1, 1.0, 0.0, 0.0),
        (1.0, 0, 1e-12, 0.0, 0.0),
        (1.0, 0, 1.0, 1.0, 0.0),
        (1e-30, 0, 1.0, 0.0, 0.0),
        (1e-300, 0, 0.9, 0.0, 0.0),
    ]
    logits = torch.randn(len(rows), VOCABULARY)
    logits[:, 130] = logits[:, 77] = 9.0
    logits[1::2] -= 20  # a maximum below 0
    logits[:, 50] = logits[:, 77].nextafter(torch.tensor(-math.inf))
    assert draw(logits.to(device), parameters_of(*rows)).tolist() == [77] * len(rows)
    # All of the equal ones are kept.
    rows = [(*row[:4], 0.75) for row in rows[2:]]
    assert draw(logits[2:].to(device), parameters_of(*rows)).tolist() == [130] * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_exact(device, dtype):
    """Logits that fall from token to token: the last chance takes the last token that is kept."""
    exponents = torch.arange(40) * 0.0625 + 0.75
    logits = (-exponents).to(dtype)
    sums = torch.softmax(logits.double(), 0).cumsum(0)
    kept = torch.randperm(39)[:5] + 1
    last = 1 - 2**-53
    rows = [(1.0, k, 1.0, 0.0, last) for k in kept.tolist()]
    rows += [(1.0, 0, float(sums[k - 1] - 1e-4), 0.0, last) for k in kept.tolist()]
    rows += [(1.0, 0, 1.0, math.exp(-(k - 0.5) * 0.0625), last) for k in kept.tolist()]
    tokens = draw(logits.to(device).expand(len(rows), -1), parameters_of(*rows)).tolist()
    assert tokens == (kept - 1).tolist() * 3


def test_top_p_is_a_share_of_what_the_others_left(device):
    logits = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]).log().to(device)
    rows = [(1.0, 2, 0.5, 0.0, 0.99), (1.0, 0, 0.5, 0.5, 0.99), (1.0, 0, 0.5, 0.0, 0.99)]
    tokens = draw(logits.expand(3, -1), parameters_of(*rows), part=2, parts_at_once=2)
    assert tokens.tolist() == [0, 0, 1]


def test_a_border_belongs_to_the_next_token(device):
    """Equal weights of exactly 1; tokens without any are stepped over."""
    logits = torch.zeros(1, 8)
    logits[0, [0, 2, 5, 6]] = -math.inf
    rows = [(1.0, 0, 1.0, 0.0, u) for u in (0.0, 0.25, 0.5, 0.75)]
    rows += [(1.0, 4, *row[2:]) for row in rows]
    tokens = draw(logits.to(device).expand(8, -1), parameters_of(*rows), part=2, parts_at_once=2)
    assert tokens.tolist() == [1, 3, 4, 7] * 2


def test_zero_is_equal_to_minus_zero(device):
    logits = torch.full((2, VOCABULARY), -1.0)
    logits[:, 20], logits[:, 90] = -0.0, 0.0
    rows = [(1.0, 1, 1.0, 0.0, 0.1), (1.0, 1, 1.0, 0.0, 0.9)]
    assert draw(logits.to(device), parameters_of(*rows)).tolist() == [20, 90]


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, 0.0), (1.0, 9, 0.8, 0.01)])
def test_broken_rows_give_some_token_and_leave_others_alone(device, row):
    logits = torch.randn(6, VOCABULARY)
    alone = draw(logits[5:].to(device), parameters_of((*row, 0.4))).tolist()
    logits[0], logits[1], logits[2] = math.nan, -math.inf, math.inf
    logits[3, ::2] = math.nan
    logits[4, 100] = math.inf
    tokens = draw(logits.to(device), parameters_of(*[(*row, 0.4)] * 6)).tolist()
    assert all(0 <= t < VOCABULARY for t in tokens)
    assert tokens[3] % 2 == 1
    assert tokens[4] == 100
    assert tokens[5:] == alone


def test_any_layout(device):
    """Rows of a wider matrix, and a transposed one, which is copied."""
    wide = torch.randn(2, 200, device=device)
    rows = parameters_of((1.0, 9, 1.0, 0.0, 0.3), (1.0, 0, 0.7, 0.0, 0.6))
    expected = draw(wide[:, :VOCABULARY].contiguous(), rows).tolist()
    assert draw(wide[:, :VOCABULARY], rows).tolist() == expected
    packed = torch.from_numpy(sampling.pack(rows, VOCABULARY)).to(device)
    transposed = wide[:, :VOCABULARY].t().contiguous().t()
    assert triton_sampling.draw(transposed, packed) is None
    assert sampling.draw_packed(transposed, packed).tolist() == expected


def test_changed_logits(device):
    logits = torch.randn(3, 50)
    expected = logits.double()
    places = torch.randperm(150)[:70]
    factors, amounts = torch.rand(70) + 0.5, torch.rand(70)
    amounts[:5] = math.inf
    for place, factor, amount in zip(
        places.tolist(), factors.double(), amounts.double(), strict=True
    ):
        value = expected.view(-1)[place]
        expected.view(-1)[place] = (value / factor if value > 0 else value * factor) - amount
    plain, changed = logits.clone(), logits.to(device)
    sampling.plain_sampling.change_logits(plain, places, factors, amounts)
    sampling.change_logits(changed, places.to(device), factors.to(device), amounts.to(device))
    torch.testing.assert_close(plain.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(changed.cpu(), plain, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="contiguous float32"):
        sampling.change_logits(changed.double(), places, factors, amounts)
