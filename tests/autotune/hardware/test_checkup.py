import dataclasses
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.hardware import checkup
from autotune.hardware.checkup import Check
from autotune.hardware.gpu import Gpu, GpuReadings
from engine import kernel_tuning
from kernels import limits
from kernels.limits import TritonStatus


def gpu(**known: Any) -> Gpu:
    fields = dict.fromkeys(Gpu.__dataclass_fields__)
    return Gpu(**{**fields, "index": 0, "name": "Example GPU", **known})


def machine(**changes: Any) -> dict[str, Any]:
    cpu = {
        "model": "Example",
        "cores_usable": 2,
        "cores_logical": 4,
        "quota": None,
        "features": ["avx2"],
    }
    memory = {"available_bytes": 8 << 30, "total_bytes": 16 << 30, "limit_bytes": None}
    found: dict[str, Any] = {"cpu": cpu, "memory": memory, "system": {"machine": "x86_64"}}
    for name, value in changes.items():
        part = next(p for p in (cpu, memory) if name in p)
        part[name] = value
    return found


def versions(**installed: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return version


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ("2.11.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("3", "ok"),
        ("2.10.1", "degraded"),
        ("2.9", "degraded"),
        ("10.0", "degraded"),
    ],
)
def test_versions_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, found: str, status: str
) -> None:
    monkeypatch.setattr(checkup, "version", versions(example=found))
    check = checkup.check_library("example<10,>=2.11")
    assert check.status == status
    assert check.found.startswith(found)
    assert (check.remedy is None) == (status == "ok")


def test_a_missing_library_is_told_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "version", versions())
    check = checkup.check_library("jinja2>=3.1")
    assert (check.status, check.remedy) == ("missing", "pip install 'jinja2>=3.1'")
    assert not check.fatal
    assert checkup.check_library("torch>=2.11").fatal


def test_a_library_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    check = checkup.check_library("tokenizers>=0.1")
    assert check.fatal
    assert "cannot be imported" in check.found


def test_all_requirements_are_looked_at_but_not_the_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["rich>=13", "absent>=1 ; python_version > '3'", "mypy>=1; extra == 'dev'"]
    monkeypatch.setattr(checkup, "requires", lambda name: wanted)
    rich, absent = checkup.check_libraries()
    assert (rich.name, rich.status) == ("rich", "ok")
    assert (absent.name, absent.status) == ("absent", "missing")


def test_a_product_that_is_not_installed_is_told() -> None:
    (check,) = checkup.check_libraries("no-such-distribution")
    assert check.status == "degraded"
    assert check.remedy


def test_processor_and_memory_are_judged() -> None:
    assert checkup.check_processor(machine()).status == "ok"
    assert "2 of 4 cores" in checkup.check_processor(machine()).found
    assert "quota 1.5" in checkup.check_processor(machine(quota=1.5)).found
    assert checkup.check_processor(machine(features=["neon"])).status == "degraded"
    assert checkup.check_memory(machine()).status == "ok"
    scarce = checkup.check_memory(machine(available_bytes=1 << 30, limit_bytes=2 << 30))
    assert scarce.status == "degraded"
    assert "container limit 2.0 GiB" in scarce.found


def test_load_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.4, 9.0, 9.0), raising=False)
    assert checkup.check_load(machine()).status == "ok"
    monkeypatch.setattr(os, "getloadavg", lambda: (3.1, 0.0, 0.0), raising=False)
    check = checkup.check_load(machine())
    assert check.status == "degraded"
    assert "3.1 programs were running on 4 cores" in check.found
    monkeypatch.delattr(os, "getloadavg")
    assert checkup.check_load(machine()).status == "ok"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "LEAST_DISK_BYTES", 1)
    assert checkup.check_disk(tmp_path).status == "ok"
    monkeypatch.setattr(checkup, "LEAST_DISK_BYTES", 1 << 70)
    assert checkup.check_disk(tmp_path).status == "degraded"
    assert checkup.check_disk(tmp_path / "none").status == "degraded"


def test_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.limits

    @dataclasses.dataclass
    class Status:
        available: bool
        amx: bool
        reason: str

    monkeypatch.setattr(kernels.limits, "native_status", lambda: Status(True, False, "compiled"))
    assert checkup.check_native_kernels() == Check("native kernels", "ok", "compiled")
    monkeypatch.setattr(kernels.limits, "native_status", lambda: Status(False, False, "no g++\nx"))
    check = checkup.check_native_kernels()
    assert check.status == "degraded"
    assert "no g++" in check.found
    assert "\n" not in check.found
    assert "compiler" in (check.remedy or "")


def test_gpus() -> None:
    none = GpuReadings(problem="NVML: none", remedy="install it")
    (check,) = checkup.check_gpus(none, cuda_available=False)
    assert check.status == "missing"
    assert (check.remedy or "").endswith("install it")
    assert not check.fatal
    (check,) = checkup.check_gpus(none, cuda_available=True)
    assert check.status == "degraded"

    present = GpuReadings(gpus=(gpu(memory_total_bytes=80 << 30),), driver="570")
    (check,) = checkup.check_gpus(present, cuda_available=True)
    assert check.status == "ok"
    assert check.found == "Example GPU, 80 GiB, driver 570"
    known = gpu(
        clock_sm_hz=1_500_000_000,
        clock_sm_max_hz=1_980_000_000,
        power_watts=75.4,
        temperature_celsius=33,
        ecc=False,
        pcie_generation=5,
        pcie_width=16,
    )
    (check,) = checkup.check_gpus(GpuReadings(gpus=(known,)), cuda_available=True)
    assert "1500 MHz of 1980, 75 W, 33 °C, ECC off, PCIe 5 x16, driver unknown" in check.found
    board, torch = checkup.check_gpus(present, cuda_available=False)
    assert (board.status, torch.status) == ("ok", "missing")
    assert "CUDA build" in (torch.remedy or "")

    hot = GpuReadings(gpus=(gpu(throttle_reasons=("hw_thermal_slowdown",)),))
    (check,) = checkup.check_gpus(hot, cuda_available=True)
    assert check.status == "degraded"
    assert "hw_thermal_slowdown" in check.found

    hopper = GpuReadings(gpus=(gpu(name="NVIDIA H100 80GB HBM3"),), driver="570")
    (check,) = checkup.check_gpus(hopper, cuda_available=True)
    assert check.found == "NVIDIA H100 80GB HBM3, driver 570; h100-sxm in plans"

    lost = GpuReadings(unreadable={3: "GPU is lost"})
    (check,) = checkup.check_gpus(lost, cuda_available=True)
    assert (check.name, check.status) == ("GPU 3", "degraded")


def test_embedded_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check = checkup.check_embedded_model(tmp_path)
    assert check.status == "missing"
    assert "tokenizer.json, *.safetensors" in check.found
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1" * 500_000)
    assert checkup.check_embedded_model(tmp_path).status == "ok"
    assert "0.5 MB" in checkup.check_embedded_model(tmp_path).found
    assert checkup.check_embedded_model(tmp_path / "none").status == "missing"


@pytest.mark.parametrize(
    ("status", "tuned", "expected"),
    [
        (TritonStatus(True, "compiled"), 0, ("ok", "compiled; autotune doctor --tune-kernels")),
        (TritonStatus(True, "compiled"), 7, ("ok", "compiled; 7 problems tuned")),
        (TritonStatus(False, "Triton is not installed"), 0, ("degraded", "plain PyTorch is used")),
        (TritonStatus(False, "T4 has compute capability 7.5"), 0, ("degraded", "capability 7.5")),
        (TritonStatus(False, "Triton needs a C compiler"), 0, ("degraded", "a C compiler")),
        (TritonStatus(False, "/x cannot be written"), 0, ("degraded", "cannot be written")),
    ],
)
def test_gpu_kernels_of_each_gpu(
    monkeypatch: pytest.MonkeyPatch, status: TritonStatus, tuned: int, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(limits, "triton_status", lambda device: status)
    monkeypatch.setattr(kernel_tuning, "num_tuned", lambda device: tuned)
    checks = checkup.check_triton_kernels()
    assert [check.name for check in checks] == ["GPU kernels 0", "GPU kernels 1"]
    assert checks[0].status == expected[0]
    assert expected[1] in checks[0].found
    remedy = checks[0].remedy or ""
    assert ("pip install 'triton" in remedy) is ("installed" in status.reason)
    assert ("install gcc" in remedy) is ("C compiler" in status.reason)
    assert ("TRITON_CACHE_DIR" in remedy) is ("written" in status.reason)
    assert bool(remedy) is (not status.available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [check.name for check in checkup.check_triton_kernels()] == ["GPU kernels"]


def test_without_a_gpu_there_are_no_gpu_kernels_to_check() -> None:
    if not torch.cuda.is_available():
        assert checkup.check_triton_kernels() == []
