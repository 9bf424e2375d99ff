"""From the proof to the one sentence that matters, and the `result` of `run.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autotune.search.gain import Gain
from autotune.search.objective import Objective
from autotune.search.proof import Contender

# From this share on, a better configuration can hardly show it in goodput.
SATURATED_ATTAINMENT = 0.98


def changed_knobs(default: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Knobs in which two configs differ: `{knob: [default's, other's]}`."""
    return {
        name: [default[name], config[name]] for name in default if default[name] != config[name]
    }


def choose_winner(contenders: Sequence[Contender]) -> Contender:
    """The contender to deploy; the default, which is the first, unless another proved better.

    A contender that meets the SLO beats one that does not, and one that ran beats one that never
    did. Among equals, one whose gain is proven beats the default, and the larger gain wins. A
    contender that meets the SLO where the default misses it wins without a proven gain: keeping the
    promise is the gain. Where the load was not delivered nothing is decided: it cannot win.
    """
    default = contenders[0]

    def standing(contender: Contender) -> tuple[bool, bool]:
        return contender.slo_met, contender.metrics is not None

    def better(candidate: Contender, incumbent: Contender) -> bool:
        if standing(candidate) != standing(incumbent):
            return standing(candidate) > standing(incumbent)
        if candidate.gain is None:
            return False
        if incumbent is default or incumbent.gain is None:
            return candidate.gain.proven
        return candidate.gain.low > incumbent.gain.low

    winner = default
    for contender in contenders[1:] if default.load_delivered else ():
        if contender.load_delivered and better(contender, winner):
            winner = contender
    return winner


def result_json(
    contenders: Sequence[Contender],
    objective: Objective,
    unit: str,
    importances: Mapping[str, float],
    notes: Sequence[str],
    quality: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `result` of `run.json`; `quality` is what is known of each way of quantizing."""
    default, winner = contenders[0], choose_winner(contenders)
    gain = winner.gain or Gain(1.0, 1.0, 1.0, 0.0, "ratio")
    delivered = default.load_delivered and winner.load_delivered
    proven = winner is not default and gain.proven and delivered
    return {
        "slo_met": winner.slo_met and delivered,
        "proven": proven,
        "verdict": _sentence(contenders, winner, objective, unit, delivered),
        "baseline": default.metrics,
        "winner": winner.metrics,
        "baseline_trials": default.trials,
        "winner_trials": winner.trials,
        "winner_config": winner.config,
        "changes": changed_knobs(default.config, winner.config),
        "gain": gain.to_json(),
        "finalists": [
            {
                "config": c.config,
                "changes": changed_knobs(default.config, c.config),
                "trials": c.trials,
                "gain": c.gain.to_json() if c.gain else None,
                "slo_met": c.slo_met,
            }
            for c in contenders[1:]
        ],
        "importances": dict(importances),
        "slo": [asdict(limit) for limit in winner.slo],
        "baseline_slo": [asdict(limit) for limit in default.slo],
        "notes": list(notes),
        "quality": dict(quality or {}),
    }


def _sentence(
    contenders: Sequence[Contender],
    winner: Contender,
    objective: Objective,
    unit: str,
    delivered: bool,
) -> str:
    default = contenders[0]
    if not delivered:
        return (
            "No verdict: the load generator could not deliver the load that was asked for, so the "
            "latencies are not those of the traffic."
        )
    promise = "meets the SLO" if winner.slo_met else "does not meet the SLO"
    if winner is default:
        why = (
            "no other configuration was measured against it"
            if len(contenders) == 1
            else "no finalist proved better"
        )
        return (
            f"Keep the default: {why}. It {promise}.{_where_a_gain_would_show(default, objective)}"
        )
    gain = winner.gain
    if default.metrics is None:
        return f"The winner {promise}; the default could not be measured, so there is no gain."
    if gain is None:
        return f"The winner {promise} and the default does not; its gain was not measured."
    interval = _interval(gain, objective, unit)
    if gain.proven:
        return f"The winner has {interval} and {promise}."
    return f"The winner {promise} and the default does not; its gain is not proven: {interval}."


def _where_a_gain_would_show(default: Contender, objective: Objective) -> str:
    """What to ask for instead where the offered load leaves goodput nothing to gain."""
    attained = default.metrics["slo_attainment"] if default.metrics is not None else 0.0
    if objective.name != "goodput" or attained < SATURATED_ATTAINMENT:
        return ""
    return (
        f" It served {attained:.1%} of the offered requests within the SLO, so goodput could not "
        "grow at this load: --objective capacity finds the most load that a configuration bears, "
        "--objective latency the fastest at this one."
    )


def _interval(gain: Gain, objective: Objective, unit: str) -> str:
    percent = f"{gain.confidence:.0%} interval"
    if gain.unit == "difference":
        return (
            f"{gain.value:+.3g} {unit} of {objective.name} over the default "
            f"({percent} {gain.low:+.3g} to {gain.high:+.3g})"
        )
    return (
        f"{gain.value:.3g} times the default's {objective.name} "
        f"({percent} {gain.low:.3g} to {gain.high:.3g})"
        if objective.maximise
        else f"{objective.name} {gain.value:.3g} times better than the default's "
        f"({percent} {gain.low:.3g} to {gain.high:.3g})"
    )
