"""From a profile and its diagnosis to ranked advice, each piece with its predicted gain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autotune.advise.advice import Advice, AdviceList
from autotune.advise.candidates import (
    Candidate,
    base_config,
    candidates,
    changes_of,
    effort_here,
    fill,
    open_values,
    profiled_config,
    symptoms,
    variants,
    why_not_testable,
)
from autotune.advise.commands import commands_for
from autotune.advise.facts import Facts
from autotune.advise.feasibility import infeasible_limits
from autotune.advise.rank import confidence_of, first_of, helps, ranked
from autotune.advise.side_effects import broken_limits, ruined
from autotune.advise.table import Table, Technique, factor_of, load_table
from autotune.advise.topics import topic_of
from autotune.diagnose.finding import Diagnosis
from autotune.predict.change import Change
from autotune.predict.gain import BETTER_ABOVE, PredictedGain
from autotune.profiling.schema import Profile
from autotune.search.methods_offered import Offer, offer_for
from autotune.slo import Slo
from autotune.speculative_models import methods_with_models

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
    searched: bool = False,
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
        searched: whether the profile is of the best that a search found, so that what can be tried
            here was tried.
    """
    table = load_table() if table is None else table
    slo = Slo() if slo is None else slo
    facts = Facts(profile, diagnosis, slo, _offer(profile) if offer is None else offer)
    called, unjudged = candidates(facts, table)
    advice: list[Advice] = []
    left_out = _LeftOut()
    binding = binding_metric(diagnosis)
    for candidate in called:
        options = _options(candidate, facts, predictor)
        bearable = [option for option in options if not option.ruined]
        if not bearable:
            left_out.ruinous += [option.told(candidate.row.title) for option in options[:1]]
            left_out.without_value += [] if options else [candidate.row.title]
            continue
        chosen = _chosen(bearable)
        metrics = {f.metric for f in candidate.findings} | {binding, "goodput"}
        answered = [g for g in chosen.gains if g.metric in metrics]
        if answered and not any(map(helps, answered)):
            most = max(g.value for g in answered)
            left_out.useless.append(f"{candidate.row.title} ({most:.2f}x)")
            continue
        spoilt = [o.knobs for o in options if o.ruined]
        advice.append(_advice(candidate, chosen, spoilt, facts, workload))
    listed = {item.technique for item in advice}
    alternatives = [c.row.id for c in called if set(c.row.alternative_to) & listed]
    aside = [c.row.id for c in called if all(f.metric != binding for f in c.findings)]
    ordered = ranked(advice, alternatives, aside)
    infeasible = (
        ()
        if predictor is None
        else infeasible_limits(profile, slo, predictor, ordered, searched=searched)
    )
    return AdviceList(
        advice=tuple(ordered),
        first=first_of(ordered),
        infeasible=infeasible,
        symptoms=tuple(symptoms(diagnosis, table)),
        notes=(*left_out.notes(), *_unjudged_notes(unjudged)),
    )


def binding_metric(diagnosis: Diagnosis) -> str:
    """The metric that advice is ranked by: the binding one, else that of the worst finding."""
    if diagnosis.binding is not None:
        return diagnosis.binding
    worst = max(diagnosis.findings, key=lambda f: f.severity, default=None)
    return "throughput" if worst is None else worst.metric


@dataclass(frozen=True, slots=True)
class _Option:
    """A technique with one setting of its knobs, and what that is predicted to bring.

    `broken` are limits that would no longer be met, `ruined` the metrics that it makes much worse.
    """

    knobs: Mapping[str, Any]
    why_not: str | None
    gains: tuple[PredictedGain, ...]
    gain: PredictedGain | None
    broken: Sequence[str]
    ruined: Sequence[PredictedGain]

    @property
    def score(self) -> float:
        """The gain of the binding metric, else the best of the others, 1 without any."""
        if self.gain is not None:
            return self.gain.value
        return max((g.value for g in self.gains), default=1.0)

    def told(self, title: str) -> str:
        """The technique with its knobs and what it would ruin."""
        settings = "".join(f", {name}={value}" for name, value in self.knobs.items())
        harm = ", ".join(f"{g.metric} {g.value:.2g}x" for g in self.ruined)
        return f"{title}{settings} ({harm})"


@dataclass(slots=True)
class _LeftOut:
    """Techniques that a finding calls for and that are not advised, by the reason."""

    useless: list[str] = field(default_factory=list)
    ruinous: list[str] = field(default_factory=list)
    without_value: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """One sentence a reason."""
        reasons = (
            ("Predicted to make nothing better here, and left out", self.useless),
            ("Left out for what they would make at least twice as bad", self.ruinous),
            ("Left out, as no better value can be set here", self.without_value),
        )
        return [f"{reason}: {', '.join(titles)}." for reason, titles in reasons if titles]


def _options(candidate: Candidate, facts: Facts, predictor: Predictor | None) -> list[_Option]:
    """The technique with each setting of its knobs that is worth judging.

    None at all where the config is known and has no better values.
    """
    row, metric = candidate.row, binding_metric(facts.diagnosis)
    settings = variants(row, facts)
    if not settings and (base_config(facts) is None or facts.get("is_server")):
        settings = [{}]
    options = []
    for knobs in settings:
        why_not = why_not_testable(row, knobs, facts)
        gains = _gains(candidate, knobs, facts, predictor, testable=why_not is None)
        broken = broken_limits(gains, facts.profile, facts.slo)
        harmed = ruined(gains, facts.profile, facts.slo)
        options.append(_Option(knobs, why_not, gains, _of(metric, gains), broken, harmed))
    return options


def _chosen(options: Sequence[_Option]) -> _Option:
    """The one that is predicted to do most for the binding metric and breaks nothing, if any."""
    fine = [o for o in options if not o.broken and o.score > BETTER_ABOVE]
    return max(fine or options, key=lambda o: round(o.score, 9))


def _advice(
    candidate: Candidate,
    chosen: _Option,
    spoilt: Sequence[Mapping[str, Any]],
    facts: Facts,
    workload: Sequence[str],
) -> Advice:
    """The piece of advice; settings in `spoilt` are not worth a search."""
    row, knobs = candidate.row, chosen.knobs
    testable = chosen.why_not is None
    breaks = chosen.broken[0] if chosen.broken else None
    broken = None if breaks is None else f"It is predicted to break {breaks}."
    sentences = (candidate.findings[0].sentence, fill(row.why, facts), broken)
    return Advice(
        technique=row.id,
        title=row.title,
        category=row.category,
        problems=tuple(dict.fromkeys(f.bottleneck for f in candidate.findings)),
        role=candidate.role,
        knobs=dict(knobs),
        opens=open_values(row, knobs, facts, spoilt) if testable else {},
        gain=chosen.gain,
        gains=chosen.gains,
        confidence=confidence_of(chosen.gain),
        effort=effort_here(row, knobs, facts),
        trade_off=fill(row.trade_off, facts) or _without_numbers(row.trade_off),
        check=row.check,
        why=" ".join(s for s in sentences if s),
        testable=testable,
        why_not=chosen.why_not,
        breaks=breaks,
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


def _of(metric: str, gains: Sequence[PredictedGain]) -> PredictedGain | None:
    return next((gain for gain in gains if gain.metric == metric), None)


def _offer(profile: Profile) -> Offer | None:
    if profile.hardware is None:
        return None
    config, model = profile.engine_config or {}, profile.model
    # A checkpoint that is quantized itself stays as it is; a config's quantization can be changed.
    own = config.get("quantization", "none") == "none"
    quantized = model is not None and own and model.weight_bits < 16
    offer = offer_for(profile.hardware, quantized=quantized)
    base = profiled_config(profile)
    if base is None:
        return offer
    return offer.also("speculative_method", methods_with_models(base))


def _without_numbers(text: str) -> str:
    """The text where its facts are not known."""
    return re.sub(r"\{[^}]*\}", "an unknown number of", text)


def _unjudged_notes(unjudged: Mapping[str, Sequence[str]]) -> list[str]:
    if not unjudged:
        return []
    missing = sorted({topic_of(name) for names in unjudged.values() for name in names})
    return [
        f"Not judged, as the profile does not tell {', '.join(missing)}: "
        f"{', '.join(sorted(unjudged))}."
    ]
