"""Bytes of loaded weights against theory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune.embedded import TARGET
from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.quantize.memory import theoretical_bytes
from engine.quantize.method_table import METHODS
from engine.quantize.weight_size import linear_bytes
from tests.engine.tiny_models import make_tiny

AT_LOAD = [name for name, method in METHODS.items() if not method.calibrated]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", AT_LOAD)
def test_the_embedded_model_takes_what_theory_says(method: str, dtype: torch.dtype) -> None:
    folder = open_model_folder(str(TARGET))
    spec = decoder_spec(folder)
    decoder = load_decoder(open_source(folder), spec, dtype, torch.device("cpu"), method)
    theory = theoretical_bytes(spec, method, dtype.itemsize)
    assert decoder.nbytes == pytest.approx(theory, rel=0.05)


@pytest.mark.parametrize("case", ["llama", "qwen2_tied_yarn", "gemma2", "phi3", "mixtral"])
def test_floats_of_every_kind_are_counted(case: str, tmp_path: Path) -> None:
    make_tiny(case, tmp_path)
    folder = open_model_folder(tmp_path)
    spec = decoder_spec(folder)
    decoder = load_decoder(open_source(folder), spec, torch.float32, torch.device("cpu"), "none")
    assert decoder.nbytes == pytest.approx(theoretical_bytes(spec, "none", 4), rel=0.05)


def test_one_linear_by_hand() -> None:
    assert linear_bytes(10, 128, "none") == 2560
    assert linear_bytes(10, 128, "int8") == 1280 + 40
    assert linear_bytes(10, 128, "int4") == 640 + 20 * 6
    assert linear_bytes(10, 128, "nf4") == 640 + 20 * 4
    assert linear_bytes(10, 40, "int4") == 400 + 40  # no group divides 40: int8 by channel
    with pytest.raises(KeyError):
        linear_bytes(1, 64, "int3")
