"""What one GPU achieves of its data sheet, in the units that a step's cost is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autotune.hardware.catalogue import Gpu
from autotune.hardware.efficiency import Efficiency, Factors, shifted
from autotune.planning.methods_run import matmul_rates
from autotune.simulation.interval import Interval

# A stack's kernels are not those of the anchors, and a model's shapes not those that were measured.
# A simulator that was fitted on H100s and asked about A100s and L40S was off by 13 to 16% in the
# median (BLIS, held-out runs of 2026), by far most of it in the factors that are drawn one by one;
# this is for what they have in common.
_WHOLE_STEP = Interval(1.0, 0.9, 1.12)
# Products of many rows whose weights are widened on the way. Marlin's gain falls to 1 at 128 rows
# and more; portable kernels lose more.
_WIDENING = Interval(1.15, 1.0, 1.7)
# Of plain products' rates, what grouped ones of experts achieve in reading weights and in
# arithmetic. AIConfigurator's kernel database (@095f58a51, vLLM 0.24, A100 0.14, read 2026-11-21):
# at 64 tokens Mixtral's experts are read at 0.87 of an H200's bandwidth in bf16 and 0.73 in fp8,
# Qwen3-30B-A3B's at 0.80 and 0.68, as plain weights are; at 8192 tokens the arithmetic reaches 0.84
# and 0.65 of plain products' rate on an H200, 0.65 and 0.61 on an H100, 0.32 and 0.43 on an A100,
# 0.33 and 0.64 on a B200, and half of that in fp8 by blocks.
_EXPERT_READS = Interval(0.98, 0.78, 1.03)
_EXPERT_COMPUTE = Interval(0.52, 0.27, 0.86)
# From a request's arrival to the engine's queue: HTTP, JSON, tokenizing. A server of an 8B model
# answers a short prompt in 10 ms of which its step takes about 6.
_ARRIVAL = Interval(0.002, 0.0006, 0.008)


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Achieved rates and latencies of one GPU among its like; seconds, bytes/s and operations/s.

    - `bandwidth`: of reading weights, by their bits (16, 8, 4); `kv_bandwidth` of reading cached
      keys and values, by theirs (16, 8).
    - `matmul`: of large matrix products, by the type of what meets the weights ("float", "int8",
      "fp8"); what is missing has no such units. `attention`: of prompt attention.
    - `kernel_latency`: what a kernel takes beyond its work; `attention_latency` the least time of
      an attention kernel; `launch` of a kernel in a step that is not captured.
    - `all_reduce_latency`: of one sum over the ranks, and `link` bytes/s achieved in it.
    - `host_step`, `host_sequence`: of the host while the device idles.
    - `widening`: how many times as long a product of many rows takes whose weights are widened.
    - `expert_reads`, `expert_compute`: of these rates, what grouped products of experts achieve.
    - `whole_step`: factor on all of the device's times.
    - `arrival`: from a request's arrival to the engine's queue.
    """

    bandwidth: Mapping[int, float]
    kv_bandwidth: Mapping[int, float]
    matmul: Mapping[str, float]
    attention: float
    kernel_latency: float
    attention_latency: float
    launch: float
    all_reduce_latency: float
    link: float
    host_step: float
    host_sequence: float
    widening: float = _WIDENING.value
    expert_reads: float = _EXPERT_READS.value
    expert_compute: float = _EXPERT_COMPUTE.value
    whole_step: float = 1.0
    arrival: float = _ARRIVAL.value


@dataclass(frozen=True, slots=True)
class Guess:
    """One guess at what a GPU achieves: the factors on its data sheet, and what all GPUs share."""

    factors: Factors[float]
    widening: float = _WIDENING.value
    expert_reads: float = _EXPERT_READS.value
    expert_compute: float = _EXPERT_COMPUTE.value
    whole_step: float = 1.0
    arrival: float = _ARRIVAL.value

    @classmethod
    def middle(cls, efficiency: Efficiency) -> Guess:
        """The likeliest."""
        return cls(efficiency.middle())

    @classmethod
    def drawn(cls, efficiency: Efficiency, rng: np.random.Generator) -> Guess:
        """One that may be so."""
        factors = efficiency.drawn(rng)
        widening, reads, compute, whole, arrival = rng.standard_normal(5).tolist()
        return cls(
            factors,
            shifted(_WIDENING, widening),
            shifted(_EXPERT_READS, reads),
            shifted(_EXPERT_COMPUTE, compute),
            shifted(_WHOLE_STEP, whole),
            shifted(_ARRIVAL, arrival),
        )

    def rates(self, gpu: Gpu, dtype: str, ranks: int) -> DeviceRates:
        """What it makes of a GPU's data sheet, for a model of a dtype on so many of them."""
        factors = self.factors
        peaks = matmul_rates(gpu, dtype)
        shares = factors.matmul
        half = next((shares[name] for name in ("bf16", "fp16") if name in shares), 0.5)
        link = gpu.link_among(ranks)
        # A step that is faster than expected on the whole still exceeds no peak.
        most = min(1.0, self.whole_step)
        return DeviceRates(
            bandwidth=_at_most(most, factors.bandwidth, gpu.bandwidth),
            kv_bandwidth=_at_most(most, factors.decode_attention, gpu.bandwidth),
            matmul={name: min(most, shares.get(name, half)) * peaks[name] for name in peaks},
            attention=min(most, factors.prefill_attention) * peaks["float"],
            kernel_latency=factors.kernel_latency,
            attention_latency=factors.attention_latency,
            launch=factors.eager_kernel_latency,
            all_reduce_latency=factors.all_reduce_latency[link.kind],
            link=factors.all_reduce[link.kind] * link.bytes_per_s,
            host_step=factors.step_overhead,
            host_sequence=factors.sequence_overhead,
            widening=self.widening,
            expert_reads=self.expert_reads,
            expert_compute=self.expert_compute,
            whole_step=self.whole_step,
            arrival=self.arrival,
        )


def _at_most(most: float, shares: Mapping[int, float], peak: float) -> dict[int, float]:
    return {bits: min(most, share) * peak for bits, share in shares.items()}
