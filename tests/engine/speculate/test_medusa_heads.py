"""Medusa's heads against the networks of the paper, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.speculate.medusa_heads import (
    HeadWeights,
    MedusaHeads,
    MedusaWeights,
    ResidualLayer,
    likeliest,
)
from kernels import ops

HIDDEN, VOCABULARY = 24, 50
CPU = torch.device("cpu")


class ResidualBlock(nn.Module):
    def __init__(self, layer: ResidualLayer) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.linear.weight.data = layer.weight.double()
        bias = torch.zeros(HIDDEN) if layer.bias is None else layer.bias
        self.linear.bias.data = bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.SiLU()(self.linear(x))


def reference(weights: MedusaWeights, hidden: Tensor, shared: Tensor | None = None) -> Tensor:
    scores = []
    for head in weights.heads:
        x = nn.Sequential(*map(ResidualBlock, head.layers))(hidden.double())
        output = head.output if head.output is not None else shared
        assert output is not None
        scores.append(x @ output.double().t())
    return torch.stack(scores, dim=1).detach()


def random_heads(
    num_heads: int, num_layers: int, *, own: bool = True, rows: int = VOCABULARY, bias: bool = True
) -> MedusaWeights:
    def layer() -> ResidualLayer:
        weight = torch.randn(HIDDEN, HIDDEN) * 0.3
        return ResidualLayer(weight, torch.randn(HIDDEN) if bias else None)

    return MedusaWeights(
        tuple(
            HeadWeights(
                tuple(layer() for _ in range(num_layers)),
                torch.randn(rows, HIDDEN) if own else None,
            )
            for _ in range(num_heads)
        )
    )


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_heads_are_those_of_the_paper(num_heads: int, num_layers: int, own: bool) -> None:
    weights = random_heads(num_heads, num_layers, own=own, bias=num_layers < 3)
    shared = torch.randn(VOCABULARY, HIDDEN)
    heads = MedusaHeads(weights, torch.float32, CPU, None if own else ops.pack_dense(shared))
    hidden = torch.randn(5, HIDDEN)
    expected = reference(weights, hidden, shared)
    assert heads.logits(hidden).shape == (5, num_heads, VOCABULARY)
    torch.testing.assert_close(heads.logits(hidden).double(), expected, rtol=1e-4, atol=1e-4)


def test_guesses_are_the_likeliest_with_their_probabilities() -> None:
    weights = random_heads(2, 1)
    heads = MedusaHeads(weights, torch.float32, CPU)
    hidden = torch.randn(7, HIDDEN)
    guesses = heads.guesses(hidden, 4)
    expected = reference(weights, hidden).softmax(-1).topk(4)
    assert torch.equal(guesses.token_ids, expected.indices)
    torch.testing.assert_close(
        guesses.probabilities.double(), expected.values, rtol=1e-4, atol=1e-6
    )
    assert heads.guesses(hidden, 1000).token_ids.shape == (7, 2, VOCABULARY)


@pytest.mark.parametrize("size", [50, 4096, 4100, 6400])
@pytest.mark.parametrize("count", [1, 8, 40])
def test_the_likeliest_are_found_as_sorting_finds_them(size: int, count: int) -> None:
    scores = torch.randn(3, 4, size)
    scores[0, 0, :3] = scores[0, 0, -3:] = 9.0  # equals, in groups apart
    top, places = likeliest(scores, count)
    assert torch.equal(top, scores.topk(count).values)
    assert torch.equal(scores.gather(-1, places), top)
    assert all(len(set(row)) == count for row in places.flatten(0, 1).tolist())


def test_a_token_map_names_the_rows_of_short_outputs() -> None:
    token_map = torch.randperm(VOCABULARY)[:9]
    heads = random_heads(2, 1, rows=9).heads
    mapped = MedusaHeads(MedusaWeights(heads, token_map), torch.float32, CPU)
    plain = MedusaHeads(MedusaWeights(heads), torch.float32, CPU)
    hidden = torch.randn(3, HIDDEN)
    rows = plain.guesses(hidden, 5).token_ids
    assert torch.equal(mapped.guesses(hidden, 5).token_ids, token_map[rows])


def test_only_shared_outputs_are_bounded_as_the_model_bounds_its_own() -> None:
    shared = ops.pack_dense(torch.randn(VOCABULARY, HIDDEN))
    weights = random_heads(2, 1, own=False)
    hidden = torch.randn(3, HIDDEN)
    free = MedusaHeads(weights, torch.float32, CPU, shared).logits(hidden)
    capped = MedusaHeads(weights, torch.float32, CPU, shared, soft_cap=2.0).logits(hidden)
    torch.testing.assert_close(capped, 2.0 * torch.tanh(free / 2.0))
    own = random_heads(2, 1)
    free = MedusaHeads(own, torch.float32, CPU).logits(hidden)
    assert torch.equal(MedusaHeads(own, torch.float32, CPU, soft_cap=2.0).logits(hidden), free)


def test_an_output_that_all_heads_share_is_held_once() -> None:
    output = torch.randn(VOCABULARY, HIDDEN)
    layers = [head.layers for head in random_heads(3, 1, own=False).heads]
    shared = MedusaWeights(tuple(HeadWeights(layer, output) for layer in layers))
    apart = MedusaWeights(tuple(HeadWeights(layer, output.clone()) for layer in layers))
    one, three = (MedusaHeads(weights, torch.float32, CPU) for weights in (shared, apart))
    hidden = torch.randn(4, HIDDEN)
    torch.testing.assert_close(one.logits(hidden), three.logits(hidden))
    assert three.nbytes - one.nbytes == 2 * output.numel() * 4
    borrowed = MedusaHeads(
        random_heads(3, 1, own=False), torch.float32, CPU, ops.pack_dense(output)
    )
    assert borrowed.nbytes == 3 * (HIDDEN + 1) * HIDDEN * 4


def test_quantized_heads_stay_close_and_broken_ones_are_refused() -> None:
    weights = random_heads(2, 2)
    hidden = torch.randn(6, HIDDEN)
    exact = reference(weights, hidden).float()
    rounded = MedusaHeads(weights, torch.float32, CPU, quantization="int8").logits(hidden)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    layer = weights.heads[0].layers[0]
    layer.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="of no use"):
        MedusaHeads(weights, torch.float32, CPU, quantization="int8")
