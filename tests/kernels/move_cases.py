"""Caches of random contents, and moves of their slots that overlap."""

import torch

from kernels.layer_cache import LayerCache

QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def random_cache(
    dtype: torch.dtype, shape: tuple[int, int, int, int], generator: torch.Generator
) -> LayerCache:
    """Anything in every element and scale, so that what should not be written shows."""
    tensors = [torch.randint(-99, 100, shape, generator=generator).to(dtype) for _ in range(2)]
    if dtype in QUANTIZED:
        tensors += [torch.rand(shape[:3], generator=generator) for _ in range(2)]
    return LayerCache(*tensors)


def copy_of(cache: LayerCache, device: torch.device | str = "cpu") -> LayerCache:
    """The same contents in memory of its own."""
    parts = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return LayerCache(*(None if t is None else t.to(device, copy=True) for t in parts))


def overlapping_moves(
    slots: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and targets out of few slots, so that most are both; some of either are below 0."""
    sources = torch.randint(0, slots, (count,), generator=generator)
    targets = torch.randperm(slots, generator=generator)[:count]
    sources[torch.rand(count, generator=generator) < 0.15] = -1
    targets[torch.rand(count, generator=generator) < 0.15] = -1
    return sources, targets


def same_bits(first: LayerCache, second: LayerCache) -> bool:
    """Whether two caches, of any device, hold the very same."""
    pairs = zip(
        (first.keys, first.values, first.key_scales, first.value_scales),
        (second.keys, second.values, second.key_scales, second.value_scales),
        strict=True,
    )
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and torch.equal(a.cpu().float(), b.cpu().float()))
        for a, b in pairs
    )
