"""Every operation is tested on the native kernels and on plain PyTorch alike."""

from collections.abc import Iterator

import pytest
import torch

from kernels import cpu


@pytest.fixture(params=["amx", "native", "plain"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with AMX tiles, as on a CPU that has none, and without native kernels."""
    if request.param == "plain":
        with cpu.without_native():
            yield "plain"
        return
    status = cpu.native_status()
    if not status.available:
        pytest.skip(f"no native kernels here: {status.reason}")
    if request.param == "native":
        with cpu.without_amx():
            yield "native"
        return
    if not status.amx:
        pytest.skip("no AMX here")
    yield "amx"


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh random inputs in every run; the seed is printed when a test fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator
