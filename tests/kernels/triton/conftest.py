"""Kernels run compiled where there is a GPU, and in Triton's interpreter where there is none."""

from collections.abc import Iterator

import pytest
import torch

from kernels.triton import runtime


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device whose tensors go through the Triton kernels inside the test."""
    if torch.cuda.is_available():
        found = runtime.status(torch.device("cuda"))
        if not found.available:
            pytest.skip(found.reason)
        yield torch.device("cuda")
        return
    from tests.kernels.triton.interpreter import repaired

    with repaired(), runtime.interpreting():
        yield torch.device("cpu")
