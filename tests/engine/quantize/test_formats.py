"""FP8, NF4, LLM.int8() and 2:4 against PyTorch, bitsandbytes' table and their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.quantize.forms import (
    DenseForm,
    Fp8Form,
    Int8ChannelForm,
    IntGroupForm,
    TableForm,
    dequantize,
)
from engine.quantize.fp8 import quantize_fp8
from engine.quantize.method_table import METHODS
from engine.quantize.methods import quantize_head, quantize_weight
from engine.quantize.nf4 import NF4_TABLE, quantize_nf4
from engine.quantize.wanda import prune_2_of_4

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False)
FORMS = {
    "none": DenseForm,
    "int8": Int8ChannelForm,
    "int4": IntGroupForm,
    "fp8": Fp8Form,
    "nf4": TableForm,
    "llm_int8": Int8ChannelForm,
}


def weights(seed: int, rows: int = 24, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(
        rows, 1, generator=generator
    )


@pytest.mark.parametrize("scale_of", ["channel", "tensor"])
def test_fp8_is_the_nearest_e4m3_value(scale_of: str) -> None:
    w = weights(1)
    form = quantize_fp8(w, scale_of)  # type: ignore[arg-type]
    assert form.scales.shape == ((24,) if scale_of == "channel" else (1,))
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = codes[torch.isfinite(codes)]
    scaled = w.double() / form.scales.double().reshape(-1, 1)
    nearest = (scaled[..., None] - values).abs().amin(-1)
    torch.testing.assert_close((form.data.double() - scaled).abs(), nearest, atol=1e-5, rtol=0)
    largest = form.data.double().abs()
    assert float(largest.max()) == 448.0
    if scale_of == "channel":
        assert bool((largest.amax(1) == 448.0).all())


def test_nf4_table_is_that_of_bitsandbytes(capfd: pytest.CaptureFixture[str]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    capfd.readouterr()  # it prints that it misses optional parts
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(NF4_TABLE), theirs)


def test_nf4_takes_the_nearest_entry() -> None:
    w = weights(2)
    form = quantize_nf4(w, 64)
    table = torch.tensor(NF4_TABLE, dtype=torch.float64)
    scales = w.double().reshape(24, 2, 64).abs().amax(-1)
    assert torch.equal(form.scales.double(), scales)
    scaled = w.double() / scales.repeat_interleave(64, 1)
    chosen = (scaled - table[form.q.long()]).abs()
    torch.testing.assert_close(
        chosen, (scaled[..., None] - table).abs().amin(-1), atol=1e-6, rtol=0
    )


@settings(max_examples=80, deadline=None)
@given(
    values=arrays.arrays(np.float32, (3, 64), elements=FLOATS),
    method=st.sampled_from(["int8", "int4", "fp8", "nf4", "llm_int8"]),
    zero_row=st.booleans(),
)
def test_every_method_is_finite_and_keeps_zeros(
    values: np.ndarray, method: str, zero_row: bool
) -> None:
    weight = torch.from_numpy(values)
    if zero_row:
        weight[1] = 0
    restored = dequantize(quantize_weight(weight, method))
    assert bool(torch.isfinite(restored).all())
    assert bool((restored[weight == 0] == 0).all())
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((restored - weight).abs() <= 0.16 * largest + 1e-36).all())


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.calibrated])
def test_forms_and_heads(method: str) -> None:
    assert isinstance(quantize_weight(weights(3), method), FORMS[method])
    head = quantize_head(weights(3), method)
    assert isinstance(head, DenseForm if method == "none" else Int8ChannelForm)
    if isinstance(head, Int8ChannelForm):
        assert head.outlier_threshold == (6.0 if method == "llm_int8" else 0.0)
    narrow = quantize_weight(weights(4, columns=40), method)
    assert isinstance(
        narrow, Int8ChannelForm if METHODS[method].weight_bits == 4 else FORMS[method]
    )
    if method != "none":
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_weight(weights(5).index_fill(1, torch.tensor([7]), float("nan")), method)


def test_heads_of_calibrated_methods_and_unknown_methods() -> None:
    for name in ("gptq", "awq", "smoothquant"):
        assert isinstance(quantize_head(weights(6), name), Int8ChannelForm)
        with pytest.raises(ValueError, match="needs no calibration"):
            quantize_weight(weights(6), name)
    with pytest.raises(ValueError, match="'int3' is not"):
        quantize_weight(weights(6), "int3")


def test_which_methods_run_fast_where() -> None:
    assert METHODS["none"].is_fast()
    assert METHODS["int8"].is_fast(["avx2", "avx512_vnni"])
    assert not METHODS["int8"].is_fast(["avx2"])
    assert METHODS["int8"].is_fast([], (8, 0))
    assert not METHODS["int8"].is_fast(["amx_int8"], (7, 5))
    assert METHODS["fp8"].is_fast(["amx_bf16"])
    assert METHODS["fp8"].is_fast([], (8, 9))
    assert not METHODS["fp8"].is_fast(["amx_bf16"], (8, 6))  # a GPU counts before its host
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper or name == "none"


def test_2_of_4_keeps_the_most_important_pair() -> None:
    w = weights(7)
    norms = torch.rand(128, generator=torch.Generator().manual_seed(8)) * 5
    pruned = prune_2_of_4(w, norms)
    for row, start in itertools.product(range(24), range(0, 128, 4)):
        importance = [abs(float(w[row, k])) * float(norms[k]) for k in range(start, start + 4)]
        keep = sorted(range(4), key=lambda k: -importance[k])[:2]
        for k in range(4):
            expected = float(w[row, start + k]) if k in keep else 0.0
            assert float(pruned[row, start + k]) == expected


def test_2_of_4_prunes_ties_and_refuses_what_it_cannot_prune() -> None:
    ones = torch.ones(2, 8)
    assert int((prune_2_of_4(ones, torch.zeros(8)) != 0).sum()) == 8
    with pytest.raises(ValueError, match="columns that 4 divides, got 6"):
        prune_2_of_4(ones[:, :6], torch.ones(6))
    with pytest.raises(ValueError, match="NaN"):
        prune_2_of_4(ones * float("nan"), torch.ones(8))
