"""The meter between trials: what it keeps, and what it says of weights that it cannot score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import quality as module
from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.quality import QualityMeter, check_measurable
from autotune.slo import parse_slo
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.quantize.quality import TextScore

NONE = EngineConfig(model="m")
INT4 = NONE.replace(quantization="int4")


def score(shift: float, _: EngineConfig) -> TextScore:
    generator = torch.Generator().manual_seed(3)
    log_probs = torch.randn(4, 2, 16, generator=generator).log_softmax(-1)
    return TextScore(torch.rand(4, 6, generator=generator) + shift, log_probs)


class Number(float):
    """Stands for a model."""

    def close(self) -> None:
        pass


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """Models are numbers, by which their scores differ; the list holds what was loaded."""
    loaded: list[EngineConfig] = []

    def load(config: EngineConfig) -> Any:
        loaded.append(config)
        return Number(0.0)

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(module, "score_held_out", score)
    monkeypatch.setattr(module, "_identity", lambda _, config: {"variant": config.quantization})
    return loaded


def test_reference_is_kept_for_the_next_process(tmp_path: Path, loads: list[EngineConfig]) -> None:
    first: Any = 0.0
    assert QualityMeter(tmp_path).measure(first, NONE)
    later = QualityMeter(tmp_path).measure(0.1, INT4, load_reference=False)  # type: ignore[arg-type]
    assert later is not None
    assert later["quality_loss"] == pytest.approx(math.expm1(0.1), rel=1e-4)
    assert loads == []


def test_reference_is_loaded_only_if_asked_for(tmp_path: Path, loads: list[EngineConfig]) -> None:
    meter, quantized = QualityMeter(tmp_path), 0.1
    assert meter.measure(quantized, INT4, load_reference=False) is None  # type: ignore[arg-type]
    assert loads == []
    assert meter.measure(quantized, INT4) is not None  # type: ignore[arg-type]
    assert loads == [NONE]


def test_reference_that_does_not_fit_costs_the_quality_and_not_the_trial(
    tmp_path: Path, loads: list[EngineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(_: EngineConfig) -> Any:
        raise EnvironmentLacks("no memory for it")

    monkeypatch.setattr(module, "load_model", lack)
    assert QualityMeter(tmp_path).measure(0.1, INT4) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [math.nan, math.inf, 1e4])
def test_scores_that_are_not_finite_are_none(
    tmp_path: Path, loads: list[EngineConfig], shift: float
) -> None:
    meter = QualityMeter(tmp_path)
    meter.measure(0.0, NONE)  # type: ignore[arg-type]
    broken = meter.measure(shift, INT4)  # type: ignore[arg-type]
    assert broken is not None
    assert broken["quality_loss"] is None
    numbers = [value for value in broken.values() if isinstance(value, float)]
    assert numbers
    assert all(math.isfinite(value) for value in numbers)


def test_quality_needs_a_tokenizer(tmp_path: Path) -> None:
    slo = parse_slo("quality_loss<1%")
    check_measurable(slo, EngineConfig(model=str(TARGET)))
    check_measurable(parse_slo("ttft<1s"), EngineConfig(model=str(tmp_path)))
    check_measurable(slo, EngineConfig(model=str(tmp_path), tokenizer=str(TARGET)))
    with pytest.raises(BadInput, match="no tokenizer"):
        check_measurable(slo, EngineConfig(model=str(tmp_path)))
