"""Calibrating on the real engine, with the embedded model and hardly any time."""

from __future__ import annotations

import threading

import pytest

from autotune.errors import Interrupted
from autotune.loaded_engines import LoadedEngines
from autotune.model_info import with_default_model
from autotune.predict.calibration_run import calibrate
from autotune.predict.step_cost import StepWork
from autotune.profiling.model_facts import model_facts
from engine.config import EngineConfig

HARDWARE = {"device": "cpu", "name": "test", "cores": 2}


def test_a_live_engine_is_calibrated_and_told_of() -> None:
    config = with_default_model(EngineConfig(device="cpu", max_num_seqs=4, max_model_len=256))
    engines, said = LoadedEngines(keep=False), []
    try:
        found = calibrate(
            config,
            model_facts(config),
            engines,
            hardware=HARDWARE,
            cache_dtypes=["int8"],
            budget_s=1.0,
            say=said.append,
        )
    finally:
        engines.close()
    assert ("none", "auto") in found.fits.methods
    assert found.fits.methods["none", "auto"].steps >= 8
    assert found.engine_version
    assert any("measuring steps" in line for line in said)
    small, large = StepWork(1, 0, 1, 1, 30, 0, 0), StepWork(200, 1, 0, 1, 0, 200, 20_000)
    cost = found.middle(config).cost
    assert 0 < cost.device_seconds(small) < cost.device_seconds(large)
    # The cache dtype was probed, if not swept.
    assert found.middle(config.replace(kv_cache_dtype="int8")).cost.device_seconds(small) > 0
    shape = found.cache(config)
    assert shape is not None
    assert shape.max_model_len == 256


def test_a_calibration_that_is_stopped_says_so() -> None:
    config = with_default_model(EngineConfig(device="cpu", max_num_seqs=2, max_model_len=128))
    engines, stop = LoadedEngines(keep=False), threading.Event()
    stop.set()
    try:
        with pytest.raises(Interrupted):
            calibrate(
                config,
                model_facts(config),
                engines,
                hardware=HARDWARE,
                budget_s=0.2,
                stop=stop,
            )
    finally:
        engines.close()
