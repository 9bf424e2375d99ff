"""A calibration of this machine with a tiny model: what a fit and a prediction need of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.predict.fit import probed_cost
from autotune.predict.step_cost import StepWork
from autotune.profiling.machine import calibrate_machine
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Probes
from engine.config import EngineConfig
from engine.loading import load_model
from kernels import limits
from tests.engine.tiny_models import make_tiny


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LARGEST_MATMUL", 1024)
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 16 << 20)


def _config(folder: Path, **knobs: object) -> EngineConfig:
    make_tiny("llama", folder)
    given = {"model": str(folder), "device": "cpu", "max_model_len": 96, "num_threads": 1}
    return EngineConfig.from_mapping({**given, "kv_cache_memory_bytes": 1 << 20, **knobs})


def test_a_calibration_has_what_every_offered_value_needs(tmp_path: Path) -> None:
    config = _config(tmp_path, max_num_batched_tokens=64, max_num_seqs=8)
    said: list[str] = []
    found = calibrate_machine(
        load_model(config),
        config,
        model_facts(config),
        ["none", "smoothquant", "int8"],
        ["auto", "int8"],
        budget_s=1.0,
        say=said.append,
    )
    ceilings, probes = found.ceilings, found.probes
    assert ceilings.compute_dtype == "float32"
    assert ceilings.ridge == pytest.approx(
        ceilings.matmul["float32"] / ceilings.working_set_bandwidth
    )
    assert ceilings.launch_cost_s is None
    # smoothquant ends in int8's kernels, which are measured once.
    assert [probe.method for probe in probes.linears] == ["none", "int8"]
    assert [probe.kv_cache_dtype for probe in probes.attention] == ["auto", "int8"]
    assert probes.linears[0].rows[-1] == 64
    assert max(probes.attention[0].sequences) <= 8
    assert max(probes.attention[0].contexts) <= 96
    assert probes.seconds > 0
    assert len(said) == 3
    read_back = Probes.model_validate_json(probes.model_dump_json())
    cost = probed_cost(read_back, "smoothquant", "int8")
    assert cost.device_seconds(StepWork(4, 0, 4, 4, 80, 0, 0)) > 0


def test_a_quantized_model_is_measured_as_it_is_and_without_quantization(tmp_path: Path) -> None:
    config = _config(tmp_path, quantization="int8", kv_cache_dtype="int8")
    found = calibrate_machine(
        load_model(config), config, model_facts(config), ["none"], [], budget_s=0.5
    )
    assert [probe.method for probe in found.probes.linears] == ["int8", "none"]
    assert [probe.kv_cache_dtype for probe in found.probes.attention] == ["int8"]
    assert found.ceilings.compute_dtype == "int8"
