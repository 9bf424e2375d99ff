"""What a technique changes, in terms that a prediction understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import EngineConfig

# Factors on parts of a step's cost, on the traffic and on the memory. 1 is no change.
#
# - weight_reads: bytes of weights that a step reads (their time while memory bounds them)
# - linear_compute: arithmetic of linear layers (their time while arithmetic bounds them)
# - attention_compute: prompt attention
# - kv_reads: bytes of keys and values that decodes read (their time as far as it grows with these)
# - host: time on the host each step
# - communication: collectives
# - device: everything on the device
# - rate: arrivals
# - input_tokens, output_tokens: lengths of prompts and answers
# - requests: share of the requests that still reach the model
# - kv_capacity: blocks of the cache
# - resident_weights: memory of the weights
# - tokens_per_step: tokens that a decode step yields a sequence (speculation)
# - verify_tokens: tokens that a decode computes a sequence (speculation)
# - step_overhead: seconds added to each decode step, as a share of it (drafting)
# - prefill_in_decode: share of prompt work that still runs in the decoding device's steps
# - price: of an hour
Term = Literal[
    "weight_reads",
    "linear_compute",
    "attention_compute",
    "kv_reads",
    "host",
    "communication",
    "device",
    "rate",
    "input_tokens",
    "output_tokens",
    "requests",
    "kv_capacity",
    "resident_weights",
    "tokens_per_step",
    "verify_tokens",
    "step_overhead",
    "prefill_in_decode",
    "price",
]


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor with the range in which it lies with 90% confidence; low <= value <= high."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """Knobs to set, and factors on terms of the cost that no knob here brings about.

    Knobs are judged by what the probes measured of them; a term given beside overrides that.
    """

    knobs: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[Term, Factor] = field(default_factory=dict)

    def ends(self) -> list[Change]:
        """With the uncertain factors at their lower and their upper ends; none if all are sure."""
        wide = {term: f for term, f in self.factors.items() if f.low < f.high}
        if not wide:
            return []
        ends = ({t: f.low for t, f in wide.items()}, {t: f.high for t, f in wide.items()})
        moved = [{term: Factor(v, v, v) for term, v in end.items()} for end in ends]
        return [Change(self.knobs, {**self.factors, **factors}) for factors in moved]

    def is_same(self, config: EngineConfig) -> bool:
        """Whether a config is as after the change, and nothing else is changed."""
        return not self.factors and all(
            getattr(config, name) == value for name, value in self.knobs.items()
        )


def value_of(factors: Mapping[Term, Factor], term: Term) -> float:
    """By how much a term is changed."""
    factor = factors.get(term)
    return 1.0 if factor is None else factor.value
