"""The ceilings are measured, finite and consistent; how high they are is the machine's affair."""

import pytest
import torch

from kernels import limits


def test_limits_of_this_cpu(monkeypatch):
    monkeypatch.setattr(limits, "LARGEST_MATMUL", 1024)
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 16 << 20)
    found = limits.measure_limits("cpu", budget=0.2)
    assert found.threads == torch.get_num_threads()
    assert 1e8 < found.memory_bandwidth < 1e13
    assert {"float32", "bfloat16"} <= set(found.matmul_rate)
    assert all(1e7 < rate < 1e16 for rate in found.matmul_rate.values())
    assert 1e-8 < found.call_cost < 1e-2


def test_a_dtype_without_a_matmul_has_no_rate():
    assert limits.matmul_rate(torch.bool, torch.device("cpu"), 0.01) is None


def test_what_only_a_gpu_has_is_absent_on_a_cpu():
    cpu = torch.device("cpu")
    assert limits.matmul_rate(torch.float8_e4m3fn, cpu, 0.01) is None
    assert limits.launch_cost(cpu, graph=True) is None
    assert not limits.triton_status(cpu).available


def test_the_best_run_counts():
    pauses = iter([0.0, 0.03, 0.001, 0.03, 0.03])
    seconds = limits.best_seconds(
        lambda: limits.time.sleep(next(pauses)), torch.device("cpu"), budget=0.0
    )
    assert 0.001 <= seconds < 0.03


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
def test_what_is_multiplied_is_random_and_finite(dtype):
    out = limits._matmul(dtype, 256, torch.device("cpu"))().float()
    assert out.isfinite().all()
    assert out.std() > 0


def test_bandwidth_is_measured_over_a_buffer_of_the_size_asked_for(monkeypatch):
    sizes = []

    def fixed(run, device, budget):
        sizes.append(run.__self__.nbytes)
        return 0.5

    monkeypatch.setattr(limits, "best_seconds", fixed)
    cpu = torch.device("cpu")
    assert limits.memory_bandwidth(cpu, 0.1, 3 << 20) == (3 << 20) / 0.5
    assert limits.memory_bandwidth(cpu, 0.1, 10) == (1 << 20) / 0.5
    assert limits.memory_bandwidth(cpu, 0.1) == limits.CPU_BUFFER_BYTES / 0.5
    assert sizes == [3 << 20, 1 << 20, limits.CPU_BUFFER_BYTES]
