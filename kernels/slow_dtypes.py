"""Which numbers the machine at hand multiplies slowly.

Where oneDNN has no products of bf16, f16 or int8 for a CPU, PyTorch makes them one by one, at a
tenth of the speed of float32 or less: there, making them wider first pays for all but few rows.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def _slow_on_cpu() -> frozenset[torch.dtype]:
    if not torch._C._has_mkldnn:  # all dtypes are PyTorch's own loops
        return frozenset()
    integers = torch.cpu._is_vnni_supported() or not torch.cpu._is_avx2_supported()
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        torch.int8: integers,  # on what is no x86 they are not known to be slow
    }
    return frozenset(dtype for dtype, known in fast.items() if not known)


def multiplies_slowly(x: Tensor) -> bool:
    """Whether PyTorch's matmuls of this tensor's dtype are slow on its device."""
    return x.is_cpu and x.dtype in _slow_on_cpu()
