"""How much of its data sheet a GPU delivers: factors by generation, with their spread.

A factor's spread is what is not known of one serving stack on one such GPU. It is drawn once for
the GPU, not once for a step: whatever is compared on it shares the draw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np

from autotune.errors import BadInput
from autotune.hardware.catalogue import Gpu
from autotune.simulation.interval import Interval

T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K")
# A normal variable lies within this many standard deviations with 90% probability.
Z_90 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Factors(Generic[T]):
    """Shares of a data sheet's figures (0 to 1), and times in seconds.

    Arguments:
        bandwidth: at which a large matrix streams with few rows, by bits of its weights (16, 8, 4).
        matmul: of the dense peak with many rows, by dtype (`bf16`, `fp16`, `fp8`, `int8`, `fp4`).
        prefill_attention: of the 16-bit peak, for long prompts; the work counts the causal half.
        decode_attention: of the bandwidth at which a large KV cache is read, by bits of its values
            (16, 8).
        attention_latency: least time of one attention kernel.
        kernel_latency: of any other kernel of a CUDA graph beyond its work; a dense layer has about
            eight.
        eager_kernel_latency: of a kernel launched without a graph.
        step_overhead: of the host for each step.
        sequence_overhead: of the host for each sequence of a step.
        all_reduce: of one direction of a link, by its kind; see `all_reduce_seconds`.
        all_reduce_latency: least time of an all-reduce, by the link's kind.
    """

    bandwidth: Mapping[int, T]
    matmul: Mapping[str, T]
    prefill_attention: T
    decode_attention: Mapping[int, T]
    attention_latency: T
    kernel_latency: T
    eager_kernel_latency: T
    step_overhead: T
    sequence_overhead: T
    all_reduce: Mapping[str, T]
    all_reduce_latency: Mapping[str, T]

    def each(self, change: Callable[[str, T], U]) -> Factors[U]:
        """All of them changed by a function of the field's name and the factor."""

        def every(name: str, factors: Mapping[K, T]) -> Mapping[K, U]:
            return MappingProxyType({key: change(name, f) for key, f in factors.items()})

        return Factors(
            every("bandwidth", self.bandwidth),
            every("matmul", self.matmul),
            change("prefill_attention", self.prefill_attention),
            every("decode_attention", self.decode_attention),
            change("attention_latency", self.attention_latency),
            change("kernel_latency", self.kernel_latency),
            change("eager_kernel_latency", self.eager_kernel_latency),
            change("step_overhead", self.step_overhead),
            change("sequence_overhead", self.sequence_overhead),
            every("all_reduce", self.all_reduce),
            every("all_reduce_latency", self.all_reduce_latency),
        )


# Fields that are shares of a peak, which nothing exceeds.
SHARES = frozenset({"bandwidth", "matmul", "prefill_attention", "decode_attention", "all_reduce"})
_FIELDS = tuple(Factors.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The factors of one kind of GPU, and what they are based on."""

    spread: Factors[Interval]
    basis: str
    date: str

    def middle(self) -> Factors[float]:
        """The likeliest factors."""
        return self.spread.each(lambda _, factor: factor.value)

    def drawn(self, rng: np.random.Generator) -> Factors[float]:
        """Factors as they may be on one GPU.

        A field's factors move together: who streams 16 bits well streams 8 bits well.
        """
        shifts = dict(zip(_FIELDS, rng.standard_normal(len(_FIELDS)).tolist(), strict=True))

        def shift(name: str, factor: Interval) -> float:
            drawn = shifted(factor, shifts[name])
            return min(drawn, 1.0) if name in SHARES else drawn

        return self.spread.each(shift)


def shifted(factor: Interval, deviations: float) -> float:
    """A factor above 0 that many standard deviations from its value.

    Its logarithm is normal on either side of the value, with each side's own width: Z_90 deviations
    down and up are the bounds.
    """
    bound = factor.high if deviations >= 0 else factor.low
    ratio: float = bound / factor.value
    power: float = ratio ** (abs(deviations) / Z_90)
    return factor.value * power


def all_reduce_seconds(factors: Factors[float], gpu: Gpu, gpus: int, size: float) -> float:
    """Time of an all-reduce of `size` bytes among that many GPUs of one kind; 0 for one GPU.

    In a ring each GPU sends 2 (g - 1) / g of the message (Patarasuk and Yuan, 2009); algorithms for
    small messages send more in fewer rounds, which the latency stands for.
    """
    if gpus < 2:
        return 0.0
    link = gpu.link_among(gpus)
    sent = 2 * (gpus - 1) / gpus * size
    rate = factors.all_reduce[link.kind] * link.bytes_per_s
    return factors.all_reduce_latency[link.kind] + sent / rate


def efficiency_of(gpu: Gpu) -> Efficiency:
    """The factors of a GPU: its own where it was measured, else its generation's.

    Raises:
        BadInput: a user's catalogue names a generation that there are no factors of.
    """
    table = efficiency_table()
    if gpu.name in table.devices:
        return table.devices[gpu.name]
    if gpu.generation not in table.generations:
        known = ", ".join(table.generations)
        raise BadInput(f"{gpu.name}: unknown generation {gpu.generation!r}; known are {known}")
    return table.generations[gpu.generation]


@dataclass(frozen=True, slots=True)
class EfficiencyTable:
    """Factors by generation, and by the name of each GPU that was measured itself."""

    generations: Mapping[str, Efficiency]
    devices: Mapping[str, Efficiency]


@functools.cache
def efficiency_table() -> EfficiencyTable:
    """The installed table.

    Raises:
        AutotuneError: it is broken.
    """
    from autotune.hardware.efficiency_file import read_table

    with resources.as_file(resources.files("autotune.hardware") / "efficiency.yaml") as path:
        return read_table(path)
