import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from autotune.hardware.cgroup import CgroupLimits
from autotune.hardware.detect import describe_hardware
from autotune.hardware.gpu import Gpu, GpuReadings
from autotune.hardware.processor import read_processor, usable_cores
from autotune.hardware.versions import library_versions

X86 = """processor\t: 0
model name\t: Example CPU @ 2.00GHz
flags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_tile amx_bf16
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd sve i8mm bf16
"""


def example_gpu() -> Gpu:
    fields: dict[str, Any] = dict.fromkeys(Gpu.__dataclass_fields__)
    return Gpu(**{**fields, "index": 0, "name": "Example GPU", "memory_total_bytes": 80 << 30})


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (X86, ("avx2", "avx512", "avx512_bf16", "amx", "amx_bf16")),
        (ARM, ("neon", "sve", "i8mm", "bf16")),
        ("", ()),
    ],
)
def test_processor_features(tmp_path: Path, text: str, features: tuple[str, ...]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    processor = read_processor(path)
    assert processor.features == features
    assert processor.model
    assert processor.cores_logical == psutil.cpu_count()
    if text is X86:
        assert processor.model == "Example CPU @ 2.00GHz"


def test_a_system_without_proc_still_has_a_processor(tmp_path: Path) -> None:
    assert read_processor(tmp_path / "none").model


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (16.0, 8), (2.0, 2), (1.5, 1), (0.2, 1)])
def test_usable_cores_follow_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(quota) == cores


def test_limits_of_a_container_hold_and_the_description_is_json() -> None:
    limits = CgroupLimits(cpus=1.0, memory_bytes=1 << 30, memory_free_bytes=1 << 29)
    found = describe_hardware("cpu", readings=GpuReadings(problem="none"), limits=limits)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["device"] == "cpu"
    assert found["name"] == found["cpu"]["model"]
    assert found["cores"] == 1
    assert found["memory_bytes"] == 1 << 30
    assert found["memory"]["available_bytes"] <= 1 << 29
    assert found["memory"]["machine_bytes"] == psutil.virtual_memory().total
    assert found["gpus"] == []
    assert found["gpu_problem"] == "none"


def test_without_limits_the_machine_is_described() -> None:
    found = describe_hardware("cpu", readings=GpuReadings(), limits=CgroupLimits())
    assert found["memory_bytes"] == psutil.virtual_memory().total


def test_a_measured_gpu_gives_name_and_memory() -> None:
    readings = GpuReadings(gpus=(example_gpu(),), driver="1")
    on_gpu = describe_hardware("cuda", readings=readings, limits=CgroupLimits())
    assert (on_gpu["device"], on_gpu["name"]) == ("cuda", "Example GPU")
    assert on_gpu["memory_bytes"] == 80 << 30
    assert set(on_gpu["gpu_kernels"]) == {"available", "reason"}
    on_cpu = describe_hardware("cpu", readings=readings, limits=CgroupLimits())
    assert on_cpu["name"] == on_cpu["cpu"]["model"]
    assert on_cpu["gpu_kernels"] is None
    assert [gpu["name"] for gpu in on_cpu["gpus"]] == ["Example GPU"]
    assert [gpu["catalogue"] for gpu in on_cpu["gpus"]] == [None]


def test_versions_name_what_is_installed_and_what_is_not() -> None:
    versions = library_versions()
    assert versions["python"]
    assert versions["torch"]
    assert set(versions) >= {"autotune", "transformers", "triton", "optuna"}
