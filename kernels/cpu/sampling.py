"""Choosing tokens by the native kernels."""

import torch
from torch import Tensor

from kernels.cpu.native import DTYPE_CODES, library, takes


def likeliest_shares(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """As ``kernels.sampling.likeliest_shares``; None if the logits are not of the expected kind."""
    native = library()
    if native is None or not takes(logits) or not logits.is_contiguous():
        return None
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    shares = torch.empty(rows, dtype=torch.float32)
    native.likeliest_shares(
        DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        rows,
        vocabulary,
        tokens.data_ptr(),
        shares.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, shares
