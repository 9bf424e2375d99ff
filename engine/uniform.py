"""Uniform random numbers by counter: a pure function of a seed and a position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
# Streams of a request beside its own, from which its tokens are drawn: for whether a drafted token
# is accepted, for what comes in the place of one that is not, and for what a model drafts.
ACCEPTANCE, REDRAW, DRAFTING = 1, 2, 3


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, as many as a float holds.

    The same seed and position give the same number on every machine.
    """
    state = (_mix(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(state) >> 11) / (1 << 53)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of each pair, without a turn of Python's for each."""
    states = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
    steps = np.array(positions, dtype=np.uint64) + np.uint64(1)
    states = _mix_all(_mix_all(states) + steps * np.uint64(0x9E3779B97F4A7C15))
    return (states >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each; numpy's integers wrap around by themselves."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stream_seed(seed: int, stream: int) -> int:
    """The seed of another stream of a request, whose numbers are independent of its own."""
    return _mix((seed + stream * 0xD1B54A32D192ED03) & _MASK)


def request_seed(own: int | None, engine_seed: int, request_id: str) -> int:
    """A request's seed: its own, or one that follows from the engine's seed and its id."""
    return _derived_seed(engine_seed, request_id) if own is None else own


@lru_cache(maxsize=4096)
def _derived_seed(engine_seed: int, request_id: str) -> int:
    # Remembered, since each of a request's tokens asks for it.
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
