"""What a diagnosis says: one finding a bottleneck and metric."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

DIAGNOSIS_VERSION = 1

Metric = Literal["ttft", "tpot", "throughput", "cost", "memory"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "throughput", "cost", "memory")

Bottleneck = Literal[
    "prefill_compute",  # TTFT is arithmetic on the prompt
    "prefill_bandwidth",  # prompts so short that reading the weights dominates
    "decode_weights",  # decode steps stream the weights
    "decode_kv",  # decode steps stream keys and values
    "decode_compute",  # batches so large that decode is arithmetic
    "kv_capacity",  # preemptions, refusals or waiting for want of blocks
    "model_does_not_fit",  # the weights exceed the memory
    "queue_saturation",  # more arrives than can be served
    "queue_bursts",  # served on the whole, but not when it arrives
    "host_bound",  # the device waits for the host
    "step_overhead",  # device time beyond reading and arithmetic: small kernels, or others here
    "speculation_overhead",  # drafting, and verifying drafts that are rejected
    "communication",  # ranks wait for each other
    "low_batch",  # few sequences a step although more wait or could
    "low_load",  # few sequences a step because few arrive
    "prefill_interference",  # others' prompts delay decodes
    "static_batching",  # seats stay empty until a whole batch has ended
    "poor_prefix_reuse",  # equal prefixes are computed again
    "long_prompts",  # prompts dwarf answers, as in retrieval
    "long_outputs",  # a few long answers take most decode steps
    "throttling",  # power or heat lowers the clocks
    "load_imbalance",  # ranks wait for a slower one
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One bottleneck of one metric.

    `share` is the part of the metric's time (or of memory) that it takes, 0..1; `severity` in 0..1
    orders the findings of a metric: the share, weighted by how far the metric misses its limit or
    its ceiling. `evidence` are the numbers behind it by profile field; `sentence` says it to a
    newcomer.
    """

    metric: Metric
    bottleneck: Bottleneck
    severity: float
    share: float
    evidence: dict[str, float | int | str | bool | None]
    sentence: str

    @property
    def level(self) -> Literal["high", "medium", "low"]:
        """Severity in a word."""
        return "high" if self.severity >= 0.5 else "medium" if self.severity >= 0.2 else "low"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings, worst first within each metric; what could not be judged, and why, in `unjudged`.

    `binding` is the metric whose limit of the SLO is furthest from being met (measured/bound
    `binding_ratio`, above 1 is missed, None if nothing finished), without an SLO of the limits that
    `run` assumes; None without a measurement.
    """

    findings: tuple[Finding, ...]
    binding: Metric | None = None
    binding_limit: str | None = None
    binding_ratio: float | None = None
    unjudged: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def of(self, metric: str) -> list[Finding]:
        """Findings of a metric, worst first."""
        return [f for f in self.findings if f.metric == metric]

    def to_json(self) -> dict[str, Any]:
        """Content of `diagnosis.json`."""
        return {
            "diagnosis_version": DIAGNOSIS_VERSION,
            "binding": self.binding,
            "binding_limit": self.binding_limit,
            "binding_ratio": self.binding_ratio,
            "findings": [{**asdict(f), "level": f.level} for f in self.findings],
            "unjudged": list(self.unjudged),
            "notes": list(self.notes),
        }
