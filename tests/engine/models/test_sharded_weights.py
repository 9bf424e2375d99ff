"""What the ranks have of a quantized weight is the whole weight, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoints.gguf.source import GgufSource
from engine.checkpoints.model_folder import open_model_folder
from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.parallel import ALONE
from engine.quantize import forms
from engine.quantize.forms import LinearForm
from kernels.ops import DenseWeight, LinearWeight, dequantize
from tests.engine.checkpoints.quantized_files import source_of
from tests.engine.checkpoints.test_gguf_models import MIXED, WIDE, as_gguf
from tests.engine.checkpoints.test_quantized_models import CASES, make
from tests.engine.tiny_llama import make_tiny_llama
from tests.engine.tiny_models import make_tiny

METHODS = ["int8", "llm_int8", "fp8", "int4", "nf4"]


def load(folder: Path, source: Any, method: str, size: int) -> tuple[Decoder, list[Decoder]]:
    """The whole model, and what each of `size` ranks has."""
    spec = decoder_spec(open_model_folder(folder))

    def part(rank: int) -> Decoder:
        ranks: Any = SimpleNamespace(rank=rank, size=size) if size > 1 else ALONE
        return load_decoder(source, spec, torch.float32, torch.device("cpu"), method, ranks=ranks)

    whole = load_decoder(source, spec, torch.float32, torch.device("cpu"), method)
    return whole, [part(rank) for rank in range(size)]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as the floats that their forms stand for: kernels' layouts may round scales."""

    def pack(parts: Sequence[LinearForm], bias: Tensor | None, _: torch.dtype) -> DenseWeight:
        data = torch.cat([forms.dequantize(part) for part in parts])
        return DenseWeight(data, bias, (data.shape[0], data.shape[1]))

    monkeypatch.setattr(forms, "pack", pack)


def check(whole: Decoder, parts: list[Decoder]) -> None:
    spec, size = whole.spec, len(parts)
    for index, layer in enumerate(whole.layers):
        layers = [part.layers[index] for part in parts]
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q, k, v = floats(layer.qkv).split([heads * dim, kv_heads * dim, kv_heads * dim])
        each = max(1, kv_heads // size)
        for rank, own in enumerate(layers):
            start = dim * (rank * kv_heads // size)
            rows = [q.chunk(size)[rank], k[start:][: each * dim], v[start:][: each * dim]]
            assert torch.equal(floats(own.qkv), torch.cat(rows))
        same_columns(layer.output, [own.output for own in layers])
        check_mlps(layer, layers)
    vocabulary = torch.cat([floats(part.head) for part in parts])
    assert torch.equal(vocabulary, floats(whole.head))


def check_mlps(layer: Layer, layers: list[Layer]) -> None:
    assert isinstance(layer.mlp, Mlp)
    gate, up = floats(layer.mlp.gate_up).chunk(2)
    whole = torch.cat([gate, up, floats(layer.mlp.down).T], 1)
    parts = []
    for own in layers:
        assert isinstance(own.mlp, Mlp)
        gate, up = floats(own.mlp.gate_up).chunk(2)
        parts.append(torch.cat([gate, up, floats(own.mlp.down).T], 1))
    found = torch.cat(parts)
    if not torch.equal(found, whole):
        # Another order of the inner features is the same MLP.
        assert {tuple(row.tolist()) for row in found} == {tuple(row.tolist()) for row in whole}
        assert len(found) == len(whole)


def same_columns(whole: LinearWeight, parts: list[LinearWeight]) -> None:
    assert torch.equal(torch.cat([floats(part) for part in parts], 1), floats(whole))


def floats(weight: LinearWeight) -> Tensor:
    return dequantize(weight).float()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", METHODS)
def test_rounded_when_loaded(method: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, num_hidden_layers=1, intermediate_size=192)
    check(*load(tmp_path, source_of(tmp_path), method, 4))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", CASES)
def test_read_from_checkpoints(case: str, tmp_path: Path) -> None:
    make(case, tmp_path, num_hidden_layers=1)
    check(*load(tmp_path, source_of(tmp_path), "none", 2))


@pytest.mark.usefixtures("exact")
def test_read_from_gguf(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path, **WIDE)
    path = tmp_path / "mixed.gguf"
    as_gguf(tiny, path, MIXED)
    check(*load(path, GgufSource(path), "none", 2))


@pytest.mark.parametrize("case", [*METHODS, *CASES])
def test_they_stay_quantized(case: str, tmp_path: Path) -> None:
    if case in METHODS:
        make_tiny_llama(tmp_path, num_hidden_layers=1, intermediate_size=192)
    else:
        make(case, tmp_path, num_hidden_layers=1)
    method = case if case in METHODS else "none"
    _, parts = load(tmp_path, source_of(tmp_path), method, 2)
    for part in parts:
        (layer,) = part.layers
        assert isinstance(layer.mlp, Mlp)
        assert not isinstance(layer.qkv, DenseWeight)
        assert not isinstance(layer.mlp.gate_up, DenseWeight)
        assert not isinstance(layer.mlp.down, DenseWeight)
        # Heads cannot be sorted by the groups of columns that lie anywhere.
        assert isinstance(layer.output, DenseWeight) is ("desc_act" in case)
        assert bool(part.notes) is ("desc_act" in case)
