"""Every block type against the format's own library, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from engine.checkpoints.gguf.blocks import BLOCK_TYPES
from engine.quantize import forms
from tests.engine.checkpoints.gguf_files import random_blocks

QUANTIZED = {code: block for code, block in BLOCK_TYPES.items() if block.elements > 1}


def random_rows(code: int, seed: int, rows: int = 5, blocks: int = 3) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(code)
    return random_blocks((rows, blocks * BLOCK_TYPES[code].elements), kind, seed)


@pytest.mark.parametrize("code", QUANTIZED, ids=[b.name for b in QUANTIZED.values()])
def test_blocks_stand_for_the_floats_of_the_library(code):
    raw = random_rows(code, seed=code)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(code))
    assert np.array_equal(BLOCK_TYPES[code].floats(raw).numpy(), expected)


@pytest.mark.parametrize("code", QUANTIZED, ids=[b.name for b in QUANTIZED.values()])
def test_the_form_stands_for_the_same_floats(code):
    raw = random_rows(code, seed=100 + code)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(code)))
    form = BLOCK_TYPES[code].form(raw)
    assert isinstance(form, forms.IntGroupForm) == (BLOCK_TYPES[code].affine is not None)
    error = (forms.dequantize(form) - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_a_group_of_one_value_has_no_scale_and_keeps_its_value(name):
    """A constant group is stored with scale 0: nothing may divide by it."""
    code = next(c for c, b in BLOCK_TYPES.items() if b.name == name)
    raw = random_rows(code, seed=3, rows=2, blocks=2)
    raw[:, :2] = 0  # d of the first block of each row
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(code)))
    actual = forms.dequantize(BLOCK_TYPES[code].form(raw))
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("code", [0, 1, 30])
def test_floats_are_read_as_they_are(code):
    values = torch.randn(3, 8).to({0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[code])
    raw = values.view(torch.uint8).numpy().reshape(3, -1)
    raw.flags.writeable = False
    assert torch.equal(BLOCK_TYPES[code].floats(raw), values.float())


def test_types_are_named_and_sized_as_in_the_library():
    for code, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(code)
        assert block.name == kind.name
        assert (block.elements, block.bytes) == gguf.GGML_QUANT_SIZES[kind]
