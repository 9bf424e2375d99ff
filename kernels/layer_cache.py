"""The KV cache of one layer, as attention and the cache write see it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rounding import quantize_last


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values in pages, [num_blocks, kv_heads, block_size, head_dim], contiguous.

    In the model's dtype, or quantized to int8 or float8_e4m3fn. A quantized cache has a float32
    scale for each head of each token, `key_scales` and `value_scales` [num_blocks, kv_heads,
    block_size]: what is cached is `data * scale`. A token's scale follows from the token alone, so
    what attention reads does not depend on what else was computed with it.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """Pages."""
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens in a page."""
        return self.keys.shape[2]

    @property
    def is_quantized(self) -> bool:
        """Whether elements are int8 or FP8 with scales."""
        return self.key_scales is not None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @classmethod
    def allocate(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "LayerCache":
        """A cleared cache of [num_blocks, kv_heads, block_size, head_dim] in `dtype`."""
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        if dtype not in (torch.int8, torch.float8_e4m3fn):
            return cls(keys, values)
        scales = [torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]
        return cls(keys, values, scales[0], scales[1])


def quantize_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round by head and token: x [T, H, Dh] -> (data, float32 scales [T, H])."""
    data, scales = quantize_last(x, dtype)
    return data, scales[..., 0]
