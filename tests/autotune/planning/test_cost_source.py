"""Which costs a plan rests on: the data sheet's, or those of a calibration on such a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.efficiency import efficiency_of
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.cost_source import CostSource, read_cost_source
from autotune.planning.device_rates import Guess
from autotune.predict import calibration_source
from autotune.predict.cost_model import CostDraw
from autotune.predict.step_cost import StepWork
from autotune.profiling.model_facts import model_facts
from engine.config import EngineConfig
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known

WORK = StepWork(8, 0, 8, 8, 16_000, 0, 0)
CATALOGUE = load_catalogue()
SHAPE = known(models.LLAMA_3_8B)


class OnGpu:
    """A calibration of the model on a GPU that is half as fast as the catalogue expects."""

    def __init__(self, driver_name: str, warnings: tuple[str, ...] = ()) -> None:
        self.config = EngineConfig(max_model_len=4096)
        self.hardware = {"device": "cuda", "name": driver_name}
        facts = model_facts(EngineConfig(model=str(TARGET)))
        self.model = facts.model_copy(
            update={
                "name": "llama",
                "num_layers": SHAPE.num_layers,
                "hidden_size": SHAPE.hidden_size,
                "num_heads": SHAPE.num_heads,
                "vocab_size": SHAPE.vocab_size,
                "parameters": SHAPE.num_parameters,
            }
        )
        self.warnings = warnings
        self.created_at = "2026-11-01T00:00:00"
        self.median_error = 0.04
        self.wider = 0.0
        self.fits = SimpleNamespace(drift=0.03, level=0.01, pace=2.0)

    def middle(self, config: EngineConfig) -> CostDraw:
        gpu = load_catalogue().find("h100-sxm")
        return CatalogueModel(SHAPE, gpu).middle(config)

    def checked(self, *_: Any) -> OnGpu:
        return self


def seconds(source: CostSource, gpu: str) -> list[float]:
    model = source.model_of(load_catalogue().find(gpu))
    config = EngineConfig(max_model_len=4096)
    draws = [model.middle(config), *model.draws(config, 40, 0)]
    return [draw.cost.device_seconds(WORK) for draw in draws]


def test_a_calibration_counts_for_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = OnGpu("NVIDIA H100 80GB HBM3", ("older",))
    monkeypatch.setattr(calibration_source, "load_calibration", lambda _: made)
    gpus = [CATALOGUE.find("h100-sxm"), CATALOGUE.find("a100-80gb-sxm")]
    plain = read_cost_source(SHAPE, CATALOGUE, gpus, None)
    told = read_cost_source(SHAPE, CATALOGUE, gpus, tmp_path / "c.json")
    assert not plain.notes
    assert "h100-sxm" in told.notes[0]
    assert told.notes[1] == "older"
    middle, *draws = seconds(told, "h100-sxm")
    by_sheet, *wide = seconds(plain, "h100-sxm")
    assert middle == pytest.approx(2 * by_sheet, rel=0.1)
    assert np.std(np.log(draws)) < 0.7 * np.std(np.log(wide))
    assert seconds(told, "a100-80gb-sxm") == seconds(plain, "a100-80gb-sxm")
    # What binds is asked of the data sheet alone.
    sheet = told.scaled(load_catalogue().find("h100-sxm"))
    cost = sheet.middle(EngineConfig(max_model_len=4096)).cost
    assert cost.device_seconds(WORK) == by_sheet


def test_a_calibration_of_no_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_source, "load_calibration", lambda _: OnGpu("Some CPU"))
    with pytest.raises(BadInput, match="no GPU of the catalogue"):
        read_cost_source(SHAPE, CATALOGUE, [], tmp_path)


def test_factors_of_the_middle_are_the_catalogues() -> None:
    efficiency = efficiency_of(load_catalogue().find("h100-sxm"))
    assert Guess.middle(efficiency).factors == efficiency.middle()
