import pytest
import torch

from autotune.hardware import ceilings
from autotune.hardware.ceilings import Rate, measure_ceilings
from kernels import limits


def test_rounds_are_summarised_and_unknown_dtypes_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([30.0, 10.0, 20.0])
    rates = {torch.float32: 1.0, torch.bfloat16: 4.0, torch.float16: None, torch.int8: 8.0}
    rates[torch.float8_e4m3fn] = None
    budgets = []

    def bandwidth(device: torch.device, budget: float) -> float:
        budgets.append(budget)
        return next(readings)

    monkeypatch.setattr(limits, "memory_bandwidth", bandwidth)
    monkeypatch.setattr(limits, "matmul_rate", lambda dtype, device, budget: rates[dtype])
    steps: list[str] = []
    found = measure_ceilings("cpu", 0.9, steps.append)
    assert found.bandwidth == Rate(median=20.0, low=10.0, high=30.0)
    assert found.matmul == {
        "float32": Rate(1.0, 1.0, 1.0),
        "bfloat16": Rate(4.0, 4.0, 4.0),
        "int8": Rate(8.0, 8.0, 8.0),
    }
    assert (found.launch_cost, found.graph_launch_cost) == (None, None)
    assert sum(budgets) == pytest.approx(0.9)
    assert len(steps) == ceilings.ROUNDS


def test_a_slow_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_bandwidth", lambda device, budget: 1.0)
    monkeypatch.setattr(limits, "matmul_rate", lambda dtype, device, budget: 1.0)
    monkeypatch.setattr(ceilings, "LONGEST_SECONDS", -1.0)
    steps: list[str] = []
    assert measure_ceilings("cpu", 0.9, steps.append).bandwidth == Rate(1.0, 1.0, 1.0)
    assert len(steps) == 1
