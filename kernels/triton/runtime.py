"""Where the Triton kernels run, and what they need to know of a device. Imports no Triton."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what activations can be


class DeviceFacts(NamedTuple):
    """What launches depend on; `shared_memory` in bytes, the most that one block can have.

    A tuple, because it is part of the key by which every launch finds its tiles.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True, slots=True)
class TritonStatus:
    """Whether the Triton kernels run on a device; if not, why, in a few words."""

    available: bool
    reason: str


# What launches assume in Triton's interpreter: few multiprocessors, so that small tests take the
# paths that split work as well as those that do not.
INTERPRETED = DeviceFacts("interpreter", (9, 0), 8, 232_448)


class _State:
    def __init__(self) -> None:
        self.interpreting = False
        self.enabled = True


_state = _State()


@cache
def device_facts(index: int) -> DeviceFacts:
    """Facts of the CUDA device with this index, or of the interpreter where there is none."""
    if not torch.cuda.is_available():
        return INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    return DeviceFacts(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        int(getattr(properties, "shared_memory_per_block_optin", 101_376)),
    )


def facts_of(x: Tensor) -> DeviceFacts:
    """Facts of the device that holds x."""
    return INTERPRETED if x.device.type == "cpu" else device_facts(x.device.index or 0)


def missing_to_build() -> str:
    """What Triton lacks on this machine to build and keep its kernels; "" if nothing.

    Beside them that is a small extension module in C, compiled when first used: this looks for a
    compiler and headers as ``triton.runtime.build`` does, and for the folder of ``triton.knobs``.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: there is no gcc, no clang and no CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton on Debian
    headers = Path(sysconfig.get_paths(scheme)["include"])
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not (headers / "Python.h").is_file():
        return f"Triton needs Python's C headers: there is no Python.h in {headers}"
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111 - never raises
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        return f"Triton needs a folder for what it compiles: {folder} cannot be written"
    return ""


@cache
def status(device: torch.device) -> TritonStatus:
    """Whether the kernels run on `device`; the interpreter is not counted."""
    if device.type != "cuda":
        return TritonStatus(False, "they are for GPUs")
    if not torch.cuda.is_available():
        return TritonStatus(False, "PyTorch sees no CUDA device")
    if importlib.util.find_spec("triton") is None:
        return TritonStatus(False, "Triton is not installed")
    if missing := missing_to_build():
        return TritonStatus(False, missing)
    facts = device_facts(device.index or 0)
    if facts.capability < LEAST_CAPABILITY:
        major, minor = facts.capability
        return TritonStatus(
            False, f"{facts.name} has compute capability {major}.{minor}, the kernels need 8.0"
        )
    return TritonStatus(True, "compiled for this GPU at first use")


def runs_on(x: Tensor) -> bool:
    """Whether operations on x go to the Triton kernels."""
    if x.is_cpu:  # a fifth of the time that x.device.type takes
        return _state.interpreting and _state.enabled
    return _state.enabled and status(x.device).available


@contextmanager
def interpreting() -> Iterator[None]:
    """Send CPU tensors through the kernels, in Triton's interpreter: for tests.

    Raises RuntimeError unless TRITON_INTERPRET=1 was set before Triton was imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton's interpreter needs TRITON_INTERPRET=1 in the environment")
    _state.interpreting = True
    try:
        yield
    finally:
        _state.interpreting = False


@contextmanager
def without_triton() -> Iterator[None]:
    """Plain PyTorch on GPUs inside the block: for tests and for measuring what the kernels gain.

    Weights packed for the kernels before the block cannot be used inside it.
    """
    before = _state.enabled
    _state.enabled = False
    try:
        yield
    finally:
        _state.enabled = before
