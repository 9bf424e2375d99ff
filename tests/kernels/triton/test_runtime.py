"""Whether the kernels can run: what Triton needs of a machine beside a GPU."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from kernels.triton import runtime


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that is not there, and a compiler and headers, in the folder given back."""
    facts = runtime.DeviceFacts("H200", (9, 0), 132, 232_448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "device_facts", lambda _: facts)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    return tmp_path


def found() -> runtime.TritonStatus:
    return runtime.status.__wrapped__(torch.device("cuda"))


def test_a_machine_with_all_that_is_needed(gpu: Path) -> None:
    assert found().available


def test_without_a_compiler_plain_pytorch_is_used(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpu / "gcc").unlink()
    assert not found().available
    assert "C compiler" in found().reason
    monkeypatch.setenv("CC", "/opt/cc")
    assert found().available


def test_without_headers_plain_pytorch_is_used(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu / "Python.h").unlink()
    assert not found().available
    assert f"no Python.h in {gpu}" in found().reason
    monkeypatch.setenv("CPATH", "/opt/include")
    assert found().available


def test_without_a_folder_to_write_plain_pytorch_is_used(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != gpu)
    assert not found().available
    assert f"{gpu}/home/.triton/cache cannot be written" in found().reason
    (gpu / "free").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(gpu / "free" / "new"))
    assert found().available
