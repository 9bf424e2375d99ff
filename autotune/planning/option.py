"""One way of serving the traffic, as a plan reports it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.hardware.price import Price
from autotune.planning.candidates import Candidate
from autotune.planning.estimate import Estimate
from autotune.simulation.interval import Interval

HOURS_PER_MONTH = 730.0
# What a plan chooses of the engine.
_KNOBS = (
    "tensor_parallel_size",
    "quantization",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
)


@dataclass(slots=True)
class Option:
    """A candidate, how many replicas it takes, what they cost and how well they serve.

    What is None is not known: of an option that does not fit nothing but its memory is.

    - `needed`: replicas that carry the burst within the SLO; `bought` has the spares as well.
    - `metrics`: latencies at the burst with the spares away; `normal` at the asked rate with all.
    - `reason`: why it was not simulated, or why it is not feasible; one sentence.
    """

    candidate: Candidate
    price: Price | None
    known: Estimate | None = None
    needed: int | None = None
    spares: int = 0
    probability: float | None = None
    feasible: bool = False
    reason: str | None = None
    metrics: Mapping[str, Any] | None = None
    normal: Mapping[str, Any] | None = None
    limits: Sequence[Mapping[str, Any]] = ()
    binding: Mapping[str, Any] | None = None
    constraint: str | None = None
    sustained: float = 0.0
    months: float | None = None
    break_even: float | None = None
    rank: int | None = None
    rate: float = 0.0
    design_rate: float = 0.0
    mean_output: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the model serves its longest sequence in the GPUs' memory."""
        return self.candidate.cache is not None

    @property
    def bought(self) -> int | None:
        """Replicas in all."""
        return None if self.needed is None else self.needed + self.spares

    @property
    def gpus(self) -> int | None:
        """GPUs in all."""
        return None if self.bought is None else self.bought * self.candidate.choice.ranks

    @property
    def usd_per_hour(self) -> float | None:
        """What the GPUs cost."""
        if self.gpus is None or self.price is None:
            return None
        return self.gpus * self.price.usd_per_hour

    @property
    def watts(self) -> float | None:
        """The most that the GPUs draw, by their boards' limit."""
        return None if self.gpus is None else self.gpus * self.candidate.choice.gpu.tdp_watts

    def usd_for(self, replicas: int) -> float | None:
        """Per hour, of so many replicas without the spares."""
        if self.price is None:
            return None
        return (replicas + self.spares) * self.candidate.choice.ranks * self.price.usd_per_hour

    def latency(self, metric: str = "e2e", statistic: str = "p95") -> float | None:
        """A latency at the burst, in seconds."""
        if self.metrics is None:
            return None
        found = self.metrics[metric].get(statistic)
        return None if found is None else float(found["value"])

    def replicas_interval(self) -> Interval | None:
        """Replicas bought, by how far the capacity of one may be off."""
        if self.known is None or self.needed is None or self.bought is None:
            return None
        capacity = self.known.capacities()
        low = math.ceil(self.design_rate / max(capacity.high, 1e-12)) + self.spares
        high = math.ceil(self.design_rate / max(capacity.low, 1e-12)) + self.spares
        bought = float(self.bought)
        return Interval(bought, min(bought, float(low)), max(bought, float(high)))

    def to_json(self) -> dict[str, Any]:
        """By the keys of `plan --json`."""
        choice = self.candidate.choice
        usd = self.usd_per_hour
        tokens = self.rate * self.mean_output
        million = None if usd is None or tokens <= 0 else usd / (3600 * tokens) * 1e6
        latencies = ("ttft", "tpot", "itl", "e2e")
        return {
            "gpu": choice.gpu.name,
            "gpu_title": choice.gpu.title,
            **{name: getattr(self.candidate.config, name) for name in _KNOBS},
            "fits": self.fits,
            "feasible": self.feasible,
            "rank": self.rank,
            "method": "simulated" if self.known and self.known.simulated else "arithmetic",
            "reason": self.reason,
            "replicas": self.bought,
            "replicas_needed": self.needed,
            "spare_replicas": self.spares if self.needed is not None else None,
            "gpus": self.gpus,
            "output_tokens_per_s": tokens if self.needed is not None else None,
            "capacity": self._capacity(),
            "utilization": self._utilization(),
            **{name: (self.metrics or {}).get(name) for name in latencies},
            "limits": list(self.limits),
            "normal": self.normal,
            "p_meets_slo": self.probability,
            "usd_per_hour": usd,
            "usd_per_month": None if usd is None else usd * HOURS_PER_MONTH,
            "usd_per_million_tokens": million,
            "watts": self.watts,
            "intervals": self._intervals(tokens),
            "price": None
            if self.price is None
            else {
                "usd_per_gpu_hour": self.price.usd_per_hour,
                "low": self.price.low,
                "high": self.price.high,
                "where": self.price.where,
                "date": self.price.date,
            },
            "break_even_usd_per_gpu_hour": self.break_even,
            "binding_constraint": self.constraint,
            "binding": self.binding,
            "memory": self._memory(),
            "outgrown": None
            if self.needed is None
            else {"rate": self.sustained, "months": self.months},
        }

    def _capacity(self) -> dict[str, Any] | None:
        if self.known is None or self.needed is None:
            return None
        one = self.known.capacities()
        return {
            "requests_per_s_per_replica": one.to_json(),
            "requests_per_s": one.scaled(self.needed).to_json(),
            "output_tokens_per_s": one.scaled(self.needed * self.mean_output).to_json(),
        }

    def _utilization(self) -> float | None:
        if self.known is None or self.bought is None:
            return None
        return self.rate / (self.known.capacities().value * self.bought)

    def _intervals(self, tokens: float) -> dict[str, Any] | None:
        replicas = self.replicas_interval()
        if replicas is None or self.price is None:
            return None
        ranks, price = self.candidate.choice.ranks, self.price
        usd = Interval(
            replicas.value * ranks * price.usd_per_hour,
            replicas.low * ranks * price.low,
            replicas.high * ranks * price.high,
        )
        return {
            "replicas": replicas.to_json(),
            "usd_per_hour": usd.to_json(),
            "usd_per_month": usd.scaled(HOURS_PER_MONTH).to_json(),
            "usd_per_million_tokens": usd.scaled(1e6 / (3600 * tokens)).to_json(),
        }

    def _memory(self) -> dict[str, Any]:
        memory = self.candidate.memory
        needed = None
        if self.known is not None and self.needed is not None:
            state = self.known.at(self.design_rate / self.needed / self.known.correction)
            if not state.saturated[0]:
                batch = float(state.batch[0])
                spread = batch + 1.645 * math.sqrt(batch)
                needed = round(max(1.0, spread) * self.known.replica.sample.mean_footprint)
        return {
            "parts": dict(memory.parts),
            "total_bytes": memory.total,
            "fits": memory.fits,
            "shortfall_bytes": memory.shortfall_bytes,
            "kv_bytes_per_token": memory.kv_bytes_per_token,
            "kv_tokens": memory.kv_tokens,
            "kv_tokens_needed": needed,
        }
