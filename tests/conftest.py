"""Before anything imports PyTorch or Triton: threads that fit, and kernels without a GPU.

Tests run side by side, one process for each core: threads beyond that wait for each other, and made
the kernels' tests take five times as long. What threads change has a test of its own.
"""

from __future__ import annotations

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be known at its import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """What is imported and collected stays: looking for garbage in it takes minutes in all."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage; it is not looked for among what was there before."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with them."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/end_to_end/test_run"))
