"""Cases of paged attention sent through the Triton kernels."""

from dataclasses import fields, replace

import torch

from kernels.layer_cache import LayerCache
from kernels.triton.attention import paged_attention
from tests.kernels.attention_cases import RELATIVE_ERROR, Case, expected_of


def moved(case: Case, device: torch.device) -> Case:
    """The case with its tensors on the device."""

    def on_device(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    cache = LayerCache(*(on_device(getattr(case.cache, f.name)) for f in fields(case.cache)))
    values = {f.name: on_device(getattr(case.metadata, f.name)) for f in fields(case.metadata)}
    metadata = replace(case.metadata, **values)
    return replace(case, q=case.q.to(device), cache=cache, metadata=metadata)


def attend(case: Case) -> torch.Tensor:
    """The kernels' output; it is an error if they decline."""
    out = paged_attention(case.q, case.cache, case.metadata, case.scale, case.window, case.soft_cap)
    assert out is not None
    return out


def check(case: Case, device: torch.device) -> None:
    """Compare with the float64 reference."""
    expected = expected_of(case)
    actual = attend(moved(case, device)).cpu()
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[case.q.dtype], float(error)
