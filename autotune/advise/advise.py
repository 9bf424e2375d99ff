"""From a profile and its diagnosis to ranked advice, each piece with its predicted gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autotune.advise.advice import Advice, AdviceList
from autotune.advise.candidates import (
    Candidate,
    candidates,
    changes_of,
    fill,
    open_values,
    symptoms,
    variants,
    why_not_testable,
)
from autotune.advise.commands import commands_for
from autotune.advise.facts import Facts
from autotune.advise.feasibility import infeasible_limits
from autotune.advise.rank import confidence_of, first_of, harms, helps, ranked
from autotune.advise.table import Table, Technique, factor_of, load_table
from autotune.advise.topics import topic_of
from autotune.diagnose.finding import Diagnosis
from autotune.predict.change import Change
from autotune.predict.gain import PredictedGain
from autotune.profiling.schema import Profile
from autotune.search.methods_offered import Offer, offer_for
from autotune.slo import Slo

if TYPE_CHECKING:
    from autotune.predict.predictor import Predictor


# Rates between which a prediction of goodput is taken to hold.
_OTHER_LOAD = 1.05


def advise(
    profile: Profile,
    diagnosis: Diagnosis,
    predictor: Predictor | None,
    *,
    slo: Slo | None,
    offer: Offer | None = None,
    table: Table | None = None,
    workload: Sequence[str] = (),
) -> AdviceList:
    """Advice on a profile, best first.

    Args:
        profile: what was measured.
        diagnosis: its findings; a technique is advised only where one of them calls for it.
        predictor: what judges each change; None leaves every gain unknown.
        slo: the promise; its binding metric, as the diagnosis names it, ranks the advice.
        offer: what a search may choose on the device; by default what the profile's hardware runs
            fast.
        table: the techniques; by default those that are shipped.
        workload: command-line options of the traffic, for the commands.
    """
    table = load_table() if table is None else table
    slo = Slo() if slo is None else slo
    facts = Facts(profile, diagnosis, slo, _offer(profile) if offer is None else offer)
    called, unjudged = candidates(facts, table)
    advice: list[Advice] = []
    useless: dict[str, str] = {}
    breaking: list[str] = []
    for candidate in called:
        item = _judged(candidate, facts, predictor, workload)
        metrics = {f.metric for f in candidate.findings} | {binding_metric(diagnosis), "goodput"}
        answered = [g for g in item.gains if g.metric in metrics]
        if answered and not any(map(helps, answered)):
            useless[candidate.row.title] = f"{max(g.value for g in answered):.2f}x"
            continue
        broken = _broken_limits(item, profile, slo)
        if broken:
            breaking.append(item.technique)
            item = replace(item, why=f"{item.why} It is predicted to break {broken[0]}.")
        advice.append(item)
    listed = {item.technique for item in advice}
    alternatives = [c.row.id for c in called if set(c.row.alternative_to) & listed]
    ordered = ranked(advice, breaking, alternatives)
    notes = _notes(useless, unjudged)
    infeasible = () if predictor is None else infeasible_limits(profile, slo, predictor, ordered)
    return AdviceList(
        advice=tuple(ordered),
        first=first_of([a for a in ordered if a.technique not in breaking]),
        infeasible=infeasible,
        symptoms=tuple(symptoms(diagnosis, table)),
        notes=tuple(notes),
    )


def binding_metric(diagnosis: Diagnosis) -> str:
    """The metric that advice is ranked by: the binding one, else that of the worst finding."""
    if diagnosis.binding is not None:
        return diagnosis.binding
    worst = max(diagnosis.findings, key=lambda f: f.severity, default=None)
    return "throughput" if worst is None else worst.metric


def _judged(
    candidate: Candidate, facts: Facts, predictor: Predictor | None, workload: Sequence[str]
) -> Advice:
    """The candidate with the knob values that are predicted to do most for the binding metric."""
    row, metric = candidate.row, binding_metric(facts.diagnosis)
    best: tuple[float, dict[str, Any], tuple[PredictedGain, ...]] | None = None
    why_not = why_not_testable(row, {}, facts) if row.outside_reach else None
    for knobs in variants(row, facts) or [{}]:
        reason = why_not_testable(row, knobs, facts)
        gains = _gains(candidate, knobs, facts, predictor, testable=reason is None)
        gain = _of(metric, gains)
        score = gain.value if gain is not None else max((g.value for g in gains), default=1.0)
        if best is None or score > best[0] + 1e-9:
            best, why_not = (score, knobs, gains), reason
    assert best is not None
    _, knobs, gains = best
    testable = why_not is None
    own = fill(row.why, facts)
    gain = _of(metric, gains)
    return Advice(
        technique=row.id,
        title=row.title,
        category=row.category,
        problems=tuple(dict.fromkeys(f.bottleneck for f in candidate.findings)),
        role=candidate.role,
        knobs=dict(knobs),
        opens=open_values(row, knobs, facts) if testable else {},
        gain=gain,
        gains=gains,
        confidence=confidence_of(gain),
        effort=row.effort,
        trade_off=fill(row.trade_off, facts) or _without_numbers(row.trade_off),
        check=row.check,
        why=" ".join(s for s in (candidate.findings[0].sentence, own) if s),
        testable=testable,
        why_not=why_not,
        commands=commands_for(knobs, facts, testable=testable, workload=workload),
        source=row.source,
    )


def _gains(
    candidate: Candidate,
    knobs: Mapping[str, Any],
    facts: Facts,
    predictor: Predictor | None,
    *,
    testable: bool,
) -> tuple[PredictedGain, ...]:
    """What the predictor says of the change, and what the table says of whole metrics."""
    row = candidate.row
    gains: dict[str, PredictedGain] = {}
    if predictor is not None and row.sheds_load:
        gains = _goodput(Change(knobs=dict(knobs)), predictor) if testable and knobs else {}
    elif predictor is not None:
        replayed = predictor.basis == "replay"
        for change in changes_of(row, knobs, facts, testable=testable, replayed=replayed):
            found = predictor.gains(change)
            if found:
                gains = {g.metric: _based(g, change) for g in found}
                if row.effort == "buy" and "price" not in change.factors:
                    gains.pop("cost", None)  # what it costs an hour is not known
                break
        gains |= _memory(row, facts) if "memory" not in gains else {}
    for metric, effect in row.outcomes.items():
        factor = factor_of(effect, facts)
        if factor is not None:
            gains[metric] = PredictedGain(metric, factor.value, factor.low, factor.high, "estimate")
    return tuple(gains.values())


def _goodput(change: Change, predictor: Predictor) -> dict[str, PredictedGain]:
    """Requests within the SLO after a change over those before it; refused ones are not.

    The interval spans loads that differ from the profile's as two trials' may.
    """
    ratios = []
    for rate in (1.0, 1 / _OTHER_LOAD, _OTHER_LOAD):
        before, after = predictor.metrics(Change(), rate), predictor.metrics(change, rate)
        shares = [(m or {}).get("slo_attainment") for m in (before, after)]
        if not shares[0] or shares[1] is None:
            return {}
        ratios.append(shares[1] / shares[0])
    gain = PredictedGain("goodput", ratios[0], min(ratios), max(ratios), predictor.basis)
    return {"goodput": gain}


def _based(gain: PredictedGain, change: Change) -> PredictedGain:
    """The gain, called an estimate where published factors went into it."""
    return replace(gain, basis="estimate") if change.factors else gain


def _memory(row: Technique, facts: Facts) -> dict[str, PredictedGain]:
    """Memory of the weights alone, where the cache's use was not measured."""
    effect = row.effects.get("resident_weights")
    factor = None if effect is None else factor_of(effect, facts)
    if factor is None or factor.low <= 0:
        return {}
    gain = PredictedGain("memory", 1 / factor.value, 1 / factor.high, 1 / factor.low, "estimate")
    return {"memory": gain}


def _broken_limits(item: Advice, profile: Profile, slo: Slo) -> list[str]:
    """Limits that are met now and would not be, by the predicted gains."""
    by_metric = {gain.metric: gain for gain in item.gains}
    if "tpot" in by_metric:
        by_metric.setdefault("itl", by_metric["tpot"])
    broken = []
    for limit, result in zip(slo.limits, slo.evaluate(profile.metrics or {}), strict=True):
        gain = by_metric.get(limit.metric)
        if gain is None or not result.met or result.measured is None or not harms(gain):
            continue
        after = (
            result.measured * gain.value
            if limit.metric == "throughput"
            else result.measured / max(gain.value, 1e-9)
        )
        if not limit.met_by(after):
            broken.append(limit.text)
    return broken


def _of(metric: str, gains: Sequence[PredictedGain]) -> PredictedGain | None:
    return next((gain for gain in gains if gain.metric == metric), None)


def _offer(profile: Profile) -> Offer | None:
    if profile.hardware is None:
        return None
    config, model = profile.engine_config or {}, profile.model
    # A checkpoint that is quantized itself stays as it is; a config's quantization can be changed.
    own = config.get("quantization", "none") == "none"
    quantized = model is not None and own and model.weight_bits < 16
    return offer_for(profile.hardware, quantized=quantized)


def _without_numbers(text: str) -> str:
    """The text where its facts are not known."""
    import re

    return re.sub(r"\{[^}]*\}", "an unknown number of", text)


def _notes(useless: Mapping[str, str], unjudged: Mapping[str, Sequence[str]]) -> list[str]:
    notes = []
    if useless:
        told = ", ".join(f"{title} ({gain})" for title, gain in useless.items())
        notes.append(f"Predicted to make nothing better here, and left out: {told}.")
    if unjudged:
        missing = sorted({topic_of(name) for names in unjudged.values() for name in names})
        notes.append(
            f"Not judged, as the profile does not tell {', '.join(missing)}: "
            f"{', '.join(sorted(unjudged))}."
        )
    return notes
