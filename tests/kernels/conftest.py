"""Every operation is tested on the native kernels and on plain PyTorch alike."""

from collections.abc import Iterator

import pytest
import torch

from kernels import cpu


@pytest.fixture(params=["native", "plain"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the native kernels and once without."""
    if request.param == "plain":
        with cpu.without_native():
            yield "plain"
        return
    status = cpu.native_status()
    if not status.available:
        pytest.skip(f"no native kernels here: {status.reason}")
    yield "native"


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh random inputs in every run; the seed is printed when a test fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator
