"""Which advice comes first."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.advise.advice import Advice
from autotune.advise.rank import confidence_of, first_of, harms, helps, ranked
from autotune.predict.gain import PredictedGain


def gain(value: float, low: float | None = None, high: float | None = None, **others: Any) -> Any:
    known = {"basis": "replay", "statistic": "p95", **others}
    return PredictedGain("tpot", value, low or value * 0.95, high or value * 1.05, **known)


def advice(name: str, predicted: PredictedGain | None, **others: Any) -> Advice:
    values: dict[str, Any] = {
        "title": name,
        "category": "model",
        "problems": ("decode_weights",),
        "role": "primary",
        "knobs": {},
        "opens": {},
        "gains": (),
        "confidence": confidence_of(predicted),
        "effort": "knob",
        "trade_off": "",
        "check": "",
        "why": "",
        "testable": True,
    }
    return Advice(technique=name, gain=predicted, **{**values, **others})


def order(*items: Advice, others: tuple[str, ...] = (), aside: tuple[str, ...] = ()) -> str:
    return " ".join(item.technique for item in ranked(items, others, aside))


@pytest.mark.parametrize(
    ("predicted", "confidence"),
    [
        (None, "low"),
        (gain(1.5, basis="estimate"), "low"),
        (gain(1.5), "high"),
        (gain(1.5, 1.0, 2.0), "medium"),
        (gain(1.5, 0.5, 2.5), "low"),
        (gain(1.5, basis="formula"), "medium"),
    ],
)
def test_confidence_follows_from_basis_and_width(
    predicted: PredictedGain | None, confidence: str
) -> None:
    assert confidence_of(predicted) == confidence


def test_directions_have_a_tolerance() -> None:
    assert not helps(gain(1.04))
    assert helps(gain(1.06))
    assert not harms(gain(0.96))
    assert harms(gain(0.94))
    assert not helps(None)
    assert not harms(None)


def test_more_gain_comes_first_then_what_is_unknown_then_what_harms() -> None:
    assert (
        order(
            advice("d", gain(0.5)),
            advice("c", None),
            advice("b", gain(1.2)),
            advice("a", gain(2.0)),
        )
        == "a b c d"
    )


def test_a_wide_interval_counts_less_than_a_narrow_one() -> None:
    wide = advice("wide", gain(1.6, 0.7, 3.0))
    assert order(wide, advice("narrow", gain(1.4, 1.3, 1.5))) == "narrow wide"


def test_effort_decides_between_equal_gains() -> None:
    items = [advice(e, gain(1.5), effort=e) for e in ("buy", "prepare", "knob", "reload", "deploy")]
    assert order(*items) == "knob reload prepare deploy buy"


def test_what_breaks_a_limit_or_stands_in_for_another_comes_after() -> None:
    best, other = advice("best", gain(3.0)), advice("other", gain(1.2))
    assert order(advice("best", gain(3.0), breaks="ttft<1s"), other) == "other best"
    assert order(best, other, others=("best",)) == "other best"


def test_what_can_be_tried_here_comes_before_an_estimate_however_large() -> None:
    bought = advice("gpu", gain(20.0, basis="estimate"), effort="buy", testable=False)
    assert order(bought, advice("flag", gain(1.2)), advice("unknown", None)) == "flag gpu unknown"


def test_what_answers_the_binding_metric_comes_before_what_answers_another() -> None:
    cheaper = advice("cheaper", None)
    assert order(cheaper, advice("unknown", None), aside=("cheaper",)) == "unknown cheaper"
    helpful = advice("helpful", gain(1.5))
    assert order(helpful, advice("less", gain(1.2)), aside=("helpful",)) == "helpful less"


def test_the_first_step_is_the_easiest_that_is_worth_it() -> None:
    flag, bought = advice("flag", gain(1.5)), advice("gpu", gain(4.0), effort="buy", testable=False)
    assert first_of([bought, flag]) == "flag"
    assert first_of([bought]) == "gpu"
    small = advice("small", gain(1.08))
    large = advice("large", gain(3.0), effort="reload")
    assert first_of([small, large]) == "large"
    assert first_of([]) is None
    assert first_of([advice("harm", gain(0.5))]) is None
    assert first_of([advice("unknown", None)]) == "unknown"
    # Promising in the middle and harmful at the lower bound: still the best there is.
    assert first_of([advice("doubtful", gain(1.1, 0.3, 3.0))]) == "doubtful"


def test_nobody_trains_or_buys_before_trying_what_is_cheap() -> None:
    def estimated(name: str, value: float, effort: str, **others: Any) -> Advice:
        return advice(name, gain(value, basis="estimate"), effort=effort, testable=False, **others)

    bought, trained = estimated("gpu", 20.0, "buy"), estimated("student", 3.0, "train")
    prompts, rough = estimated("prompts", 1.6, "deploy"), advice("rough", gain(1.3, 0.5, 3.0))
    assert first_of([bought, trained, prompts, rough]) == "rough"
    assert first_of([bought, trained, prompts]) == "prompts"
    # A flag that hardly helps comes after a clear gain, and before what is trained or bought.
    trifle = advice("trifle", gain(1.06))
    assert first_of([bought, trifle, prompts]) == "prompts"
    assert first_of([bought, trained, trifle]) == "trifle"
    # A flag that could not be judged is tried before anything is trained.
    assert first_of([bought, trained, advice("unknown", None)]) == "unknown"
    assert first_of([bought, trained]) == "student"
    assert first_of([bought, advice("rough", gain(2.0), breaks="ttft<1s")]) == "gpu"
