"""From a profile to findings: for each metric what takes its time, worst first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from autotune.diagnose.cause import Cause, Causes
from autotune.diagnose.finding import METRICS, Bottleneck, Diagnosis, Finding, Metric
from autotune.diagnose.limits import standings, urgency
from autotune.diagnose.memory import memory_causes
from autotune.diagnose.sentences import percent
from autotune.diagnose.thresholds import MIN_SHARE
from autotune.diagnose.throughput import cost_causes, throughput_causes
from autotune.diagnose.tpot import tpot_causes
from autotune.diagnose.ttft import ttft_causes
from autotune.profiling.enough import shortage
from autotune.profiling.schema import Profile

_CAUSES: Mapping[Metric, Callable[[Profile], Causes]] = {
    "ttft": ttft_causes,
    "tpot": tpot_causes,
    "throughput": throughput_causes,
    "cost": cost_causes,
    "memory": memory_causes,
}
# What a sentence of `Profile.partial` says where it explains why a metric has no breakdown.
_TOLD_BY: Mapping[Metric, tuple[str, ...]] = {
    "ttft": ("first token", "single steps"),
    "tpot": ("output token", "single steps"),
    "throughput": ("single steps", "no step"),
    "cost": ("single steps", "no step"),
    "memory": ("KV cache", "no step"),
}


def diagnose(profile: Profile) -> Diagnosis:
    """Name the bottlenecks of every metric, with their numbers.

    The severity of a finding is its share of the metric's time, weighted by whether that time is
    lost or work, and by how near the metric is to its limit (`autotune.diagnose.thresholds`).
    Without an SLO in the profile the limits are those that `run` assumes.

    Raises:
        SloError: the profile's SLO is not one.
    """
    limits = standings(profile)
    findings: list[Finding] = []
    unjudged: list[str] = []
    for metric in METRICS:
        causes = _CAUSES[metric](profile)
        pressing = urgency(metric, profile, limits)
        findings += sorted(
            (_finding(metric, cause, pressing) for cause in _merged(causes.found)),
            key=lambda f: (-f.severity, -f.share, f.bottleneck),
        )
        unjudged += [f"{metric}: {what} {_why(profile, metric)}" for what in causes.unjudged]
    worst = limits[0] if limits else None
    bound = _bound_metric(worst.about, findings) if worst is not None else None
    return Diagnosis(
        findings=tuple(findings),
        binding=bound,
        binding_limit=None if worst is None else worst.limit,
        binding_ratio=None if worst is None or math.isinf(worst.ratio) else worst.ratio,
        unjudged=tuple(unjudged),
        notes=tuple(_notes(profile)),
    )


def _merged(causes: list[Cause]) -> list[Cause]:
    """One cause a bottleneck: shares add up, and the words are those of the largest part."""
    by_name: dict[Bottleneck, list[Cause]] = {}
    for cause in causes:
        by_name.setdefault(cause.bottleneck, []).append(cause)
    merged = []
    for name, same in by_name.items():
        largest = max(same, key=lambda c: c.share * c.weight)
        share = min(1.0, sum(c.share for c in same))
        weight = sum(c.share * c.weight for c in same) / share if share > 0 else 0.0
        if share >= MIN_SHARE:
            evidence = {k: v for c in same if c.share > 0 for k, v in c.evidence.items()}
            merged.append(Cause(name, share, min(1.0, weight), largest.sentence, evidence))
    return merged


def _finding(metric: Metric, cause: Cause, pressing: float) -> Finding:
    return Finding(
        metric=metric,
        bottleneck=cause.bottleneck,
        severity=cause.share * cause.weight * pressing,
        share=cause.share,
        evidence=cause.evidence,
        sentence=cause.sentence,
    )


def _bound_metric(about: tuple[Metric, ...], findings: list[Finding]) -> Metric | None:
    """Of the metrics that a limit is about, the one with the worst finding; cost only follows."""
    about = tuple(metric for metric in about if metric != "cost")
    if not about:
        return None
    severity = {
        metric: max((f.severity for f in findings if f.metric == metric), default=0.0)
        for metric in about
    }
    return max(about, key=lambda metric: severity[metric])


def _why(profile: Profile, metric: Metric) -> str:
    """That it is not known, by the sentence of `partial` that is about the metric, if any is."""
    about = [text for text in profile.partial if any(w in text for w in _TOLD_BY[metric])]
    if not about:
        return "is not known"
    return shortage(about[0]) or f"is not known: {about[0].rstrip('.')}"


def _notes(profile: Profile) -> list[str]:
    notes = []
    gpu = profile.gpu
    if gpu is not None and gpu.throttled_share and gpu.clock_ratio is None:
        notes.append(
            f"The GPU was slowed in {percent(gpu.throttled_share)} of the samples; what that costs "
            "is not known without its full clock."
        )
    if gpu is not None and gpu.throttled_share is None:
        notes.append(
            "Whether power or heat slowed the GPU is not known: NVML withholds the reasons."
        )
    return notes
