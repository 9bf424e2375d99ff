"""Predictions from a profile's shares alone: each part of a metric's time is scaled (Amdahl 1967).

For profiles without fitted step costs, such as those sampled from a server's metrics. Knobs that
say nothing of the parts' times cannot be judged so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from autotune.predict.asked import latency_statistics
from autotune.predict.cache_after import Served
from autotune.predict.change import Change, Factor, Term
from autotune.predict.gain import Basis, PredictedGain
from autotune.predict.memory_need import memory_gain
from autotune.predict.served import served
from autotune.profiling.schema import Breakdown, Profile
from autotune.slo import Slo
from engine.config import EngineConfig
from engine.errors import EngineError

# Terms that lengthen or shorten each component of a breakdown; `queue` follows from the rest.
COMPONENT_TERMS: Mapping[str, tuple[Term, ...]] = {
    "prefill_linear": ("linear_compute", "input_tokens", "device", "prefill_in_decode"),
    "prefill_attention": ("attention_compute", "input_tokens", "device", "prefill_in_decode"),
    "interference": ("linear_compute", "input_tokens", "rate", "device", "prefill_in_decode"),
    "weights": ("weight_reads", "device", "step_overhead"),
    "linear_compute": ("linear_compute", "verify_tokens", "device", "step_overhead"),
    "kv_reads": ("kv_reads", "device", "step_overhead"),
    "host": ("host",),
    "communication": ("communication",),
    "other": ("device", "step_overhead"),
    "preempted": (),
    "idle": (),
}
# Components of decode steps, of which there are fewer where a step yields more tokens.
_OF_DECODES = ("weights", "linear_compute", "kv_reads", "host", "communication", "other")
# Shares do not tell how parts overlap or how batches change: a gain is believed within so much of
# its logarithm, at least by a little.
_DOUBT = 0.35
_LEAST_DOUBT = 0.05
# A queue is not judged nearer to saturation than this.
_FULL = 0.98


class FormulaPredictor:
    """Scales the shares of the time that a profile tells.

    Args:
        profile: what was measured.
        slo: names the statistics that gains are told of.
    """

    basis: Basis = "formula"

    def __init__(self, profile: Profile, slo: Slo | None) -> None:
        self._profile = profile
        self._statistics = latency_statistics(slo, profile.metrics)

    def metrics(
        self, change: Change | None = None, rate_factor: float | None = 1.0
    ) -> dict[str, Any] | None:
        """Measured metrics, each latency over its gain; None for what shares do not tell."""
        change = change or Change()
        if self._profile.metrics is None or rate_factor is None:
            return None
        terms = _with_knobs(self._profile, change)
        if terms is None:
            return None
        rate = terms.get("rate")
        asked = rate_factor * (rate.value if rate else 1.0)
        terms["rate"] = Factor(asked, asked, asked)
        metrics = copy.deepcopy(self._profile.metrics)
        for metric in self._statistics:
            gain = self._gain(metric, _values(terms))
            if gain is None or not isinstance(metrics.get(metric), dict):
                continue
            metrics[metric] = {
                name: value / gain if isinstance(value, float) else value
                for name, value in metrics[metric].items()
                if name != "intervals"
            }
        metrics.pop("slo_statistics", None)
        return metrics

    def gains(self, change: Change) -> tuple[PredictedGain, ...]:
        """Gains by the shares, for each metric whose breakdown the profile has."""
        terms = _with_knobs(self._profile, change)
        if terms is None:
            return ()
        gains = []
        for metric, statistic in self._statistics.items():
            gains += _told(metric, terms, partial(self._gain, metric), statistic)
        gains += _told("throughput", terms, self._throughput)
        price = _values(terms).get("price", 1.0)
        gains += [
            dataclasses.replace(
                g, metric="cost", value=g.value / price, low=g.low / price, high=g.high / price
            )
            for g in gains
            if g.metric == "throughput"
        ]
        return (*gains, *self._memory(change))

    def _gain(self, metric: str, terms: Mapping[Term, float]) -> float | None:
        """Time of a latency before over after."""
        if metric == "e2e":
            return self._whole_gain(terms)
        breakdown = self._profile.breakdown("tpot" if metric == "itl" else metric)
        if breakdown is None:
            return None
        after = self._seconds(breakdown, terms)
        if metric in ("tpot", "itl"):
            after /= terms.get("tokens_per_step", 1.0)
        return breakdown.seconds / after if after > 0 else None

    def _whole_gain(self, terms: Mapping[Term, float]) -> float | None:
        """Of E2E: TTFT and as many TPOT as an answer has further tokens."""
        first, rest = self._profile.breakdown("ttft"), self._profile.breakdown("tpot")
        lengths = self._profile.traffic.output_tokens
        if first is None or rest is None or lengths is None:
            return None
        gains = self._gain("ttft", terms), self._gain("tpot", terms)
        if not gains[0] or not gains[1]:
            return None
        tokens = max(0.0, lengths.mean - 1)
        before = first.seconds + tokens * rest.seconds
        tokens *= terms.get("output_tokens", 1.0)
        return before / (first.seconds / gains[0] + tokens * rest.seconds / gains[1])

    def _throughput(self, terms: Mapping[Term, float]) -> float | None:
        """Wall time of the work before over after; the time in which nothing came is left out."""
        breakdown = self._profile.breakdown("throughput")
        if breakdown is None:
            return None
        busy = {n: s for n, s in breakdown.parts.items() if n not in ("idle", "queue")}
        before = sum(busy.values())
        after = sum(share * _scale(name, terms) for name, share in busy.items())
        decodes = sum(busy.get(name, 0.0) * _scale(name, terms) for name in _OF_DECODES)
        steps = terms.get("output_tokens", 1.0) / terms.get("tokens_per_step", 1.0)
        after += decodes * (steps - 1)
        share = terms.get("requests", 1.0)
        return before / after / share if after > 0 and share > 0 else None

    def _seconds(self, breakdown: Breakdown, terms: Mapping[Term, float]) -> float:
        parts = dict(breakdown.parts)
        queue = parts.pop("queue", 0.0)
        after = sum(share * _scale(name, terms) for name, share in parts.items())
        return breakdown.seconds * (after + queue * self._queue_factor(terms))

    def _queue_factor(self, terms: Mapping[Term, float]) -> float:
        """How much longer one waits, where service and arrivals change.

        Below saturation the wait goes as rho / (1 - rho) times the service time, as in M/G/1
        (Pollaczek-Khinchine); above it, as the excess of arrivals.
        """
        gain = self._throughput({t: v for t, v in terms.items() if t != "requests"})
        service = 1.0 if not gain else 1.0 / gain
        load = terms.get("rate", 1.0) * terms.get("requests", 1.0)
        before = self._profile.queueing.utilisation
        if before is None or before <= 0:
            return service
        after = before * service * load
        if before < _FULL and after < _FULL:
            return service * (after / (1 - after)) / (before / (1 - before))
        if after >= 1 and before > 1:
            return service * (1 - 1 / after) / (1 - 1 / before)
        # Over the edge in one of the two: as if just before it.
        near = [min(_FULL, rho) for rho in (before, after)]
        return service * (near[1] / (1 - near[1])) / (near[0] / (1 - near[0]))

    def _memory(self, change: Change) -> tuple[PredictedGain, ...]:
        profile = self._profile
        if profile.model is None or profile.engine_config is None:
            return ()
        try:
            config = EngineConfig.from_mapping(profile.engine_config)
            base = served(config, None, profile.model)
            changed = served(config.replace(**change.knobs), base)
        except EngineError:
            return ()
        if base is None:
            return ()
        return memory_gain(profile, base, changed, change.factors, "formula")


def _with_knobs(profile: Profile, change: Change) -> dict[Term, Factor] | None:
    """The change as factors; None if it has a knob whose effect shares do not tell.

    A quantization is judged by the bytes that it reads, with arithmetic as it was.
    """
    terms = dict(change.factors)
    if not change.knobs or terms:
        return terms
    if profile.engine_config is None or profile.model is None:
        return None
    try:
        config = EngineConfig.from_mapping(profile.engine_config)
        base: Served | None = served(config, None, profile.model)
        changed = served(config.replace(**change.knobs), base)
    except EngineError:
        return None
    known = {"quantization", "kv_cache_dtype"}
    differing = {n for n, v in change.knobs.items() if getattr(config, n) != v}
    if base is None or changed is None or not differing <= known:
        return None
    reads = changed.model.weight_bytes / base.model.weight_bytes
    kv = changed.model.kv_bytes_per_token / base.model.kv_bytes_per_token
    # Unpacking costs arithmetic: of what is saved, some may be lost again.
    terms["weight_reads"] = Factor(reads, min(reads, 1.0), max(reads, (1 + reads) / 2))
    terms["kv_reads"] = Factor(kv, min(kv, 1.0), max(kv, (1 + kv) / 2))
    return terms


def _values(terms: Mapping[Term, Factor]) -> dict[Term, float]:
    return {term: factor.value for term, factor in terms.items()}


def _scale(component: str, terms: Mapping[Term, float]) -> float:
    scale = 1.0
    for term in COMPONENT_TERMS.get(component, ()):
        value = terms.get(term)
        if value is not None:
            scale *= 1 + value if term == "step_overhead" else value
    return scale


def _told(
    metric: str,
    terms: Mapping[Term, Factor],
    gain: Callable[[Mapping[Term, float]], float | None],
    statistic: str | None = None,
) -> list[PredictedGain]:
    """A gain with its bounds: each factor's ends by themselves, and doubt of the formula."""
    middle = _values(terms)
    value = gain(middle)
    if value is None or value <= 0:
        return []
    down = up = 0.0
    for term, factor in terms.items():
        for end in (factor.low, factor.high):
            moved = gain({**middle, term: end})
            if moved is None or moved <= 0:
                continue
            log = math.log(moved / value)
            down, up = (math.hypot(down, log), up) if log < 0 else (down, math.hypot(up, log))
    doubt = max(_LEAST_DOUBT, _DOUBT * abs(math.log(value)))
    low, high = (
        value * math.exp(-math.hypot(down, doubt)),
        value * math.exp(math.hypot(up, doubt)),
    )
    return [PredictedGain(metric, value, low, high, "formula", statistic)]
