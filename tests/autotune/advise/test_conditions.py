"""Conditions are typed, are checked when read, and know what they do not know."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from autotune.advise.conditions import Condition
from tests.autotune.advise import situations

_READ: TypeAdapter[Any] = TypeAdapter(Condition)
_LEAVES: dict[bool | None, dict[str, Any]] = {
    True: {"fact": "kv.seats", "is": 6.0},
    False: {"fact": "kv.seats", "is": 7.0},
    None: {"fact": "kv.recomputed_share", "above": 0.0},
}


def holds(raw: Any, **changes: Any) -> bool | None:
    answer: bool | None = _READ.validate_python(raw).holds(
        situations.facts(situations.profile(**changes))
    )
    return answer


@pytest.mark.parametrize(
    ("operator", "operand", "expected"),
    [
        ("is", 6.0, True),
        ("is_not", 6.0, False),
        ("in", [5.0, 6.0], True),
        ("above", 6.0, False),
        ("at_least", 6.0, True),
        ("below", 6.0, False),
        ("at_most", 6.0, True),
        ("present", True, True),
        ("present", False, False),
    ],
)
def test_operators_compare_a_number(operator: str, operand: Any, expected: bool) -> None:
    assert holds({"fact": "kv.seats", operator: operand}) is expected


def test_texts_truths_and_lists_are_compared_too() -> None:
    assert holds({"fact": "device", "is": "cpu"})
    assert holds({"fact": "device", "in": ["cuda", "cpu"]})
    assert holds({"fact": "config.enable_prefix_caching", "is": True})
    assert holds({"fact": "cpu_features", "contains": "amx_int8"})
    assert not holds({"fact": "cpu_features", "contains": "neon"})
    assert holds({"fact": "source.kind", "is": "run"})
    assert holds({"fact": "phase.decode.mean_batch", "is": 8.0})


def test_an_unknown_fact_is_neither_true_nor_false_but_absent() -> None:
    assert holds(_LEAVES[None]) is None
    assert holds({"fact": "kv.recomputed_share", "present": False}) is True
    assert holds({"fact": "breakdown.tpot.kv_reads", "above": 0.1}) is None


@pytest.mark.parametrize(("one", "two"), [*itertools.product((True, False, None), repeat=2)])
def test_joined_conditions_follow_kleenes_tables(one: bool | None, two: bool | None) -> None:
    number = {True: 1.0, None: 0.5, False: 0.0}
    back = {value: key for key, value in number.items()}
    leaves = [_LEAVES[one], _LEAVES[two]]
    assert holds({"all": leaves}) is back[min(number[one], number[two])]
    assert holds({"any": leaves}) is back[max(number[one], number[two])]
    assert holds({"not": leaves[0]}) is back[1 - number[one]]


def test_what_would_have_to_be_known_is_named_unless_the_rest_decides() -> None:
    facts = situations.facts(situations.profile())
    unknown = _READ.validate_python({"all": [_LEAVES[True], {"not": _LEAVES[None]}]})
    assert unknown.unknown(facts) == ["kv.recomputed_share"]
    decided = _READ.validate_python({"all": [_LEAVES[False], _LEAVES[None]]})
    assert decided.unknown(facts) == []


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"fact": "kv.hit_rat", "above": 0.1}, "no fact"),
        ({"fact": "config.no_such_knob", "is": 1}, "no fact"),
        ({"fact": "phase.warmup.steps", "above": 1}, "no fact"),
        ({"fact": "breakdown.ttft.nothing", "above": 1}, "no fact"),
        ({"fact": "kv", "present": True}, "no fact"),
        ({"fact": "kv.hit_rate", "above": "much"}, "valid number"),
        ({"fact": "kv.hit_rate", "is": "much"}, "is a number"),
        ({"fact": "kv.hit_rate", "is": True}, "is a number"),
        ({"fact": "device", "above": 2}, "does not apply"),
        ({"fact": "device", "contains": "c"}, "does not apply"),
        ({"fact": "device", "is": 3}, "is a text"),
        ({"fact": "kv.hit_rate"}, "exactly one"),
        ({"fact": "kv.hit_rate", "above": 0.1, "below": 0.2}, "exactly one"),
        ({"fact": "kv.hit_rate", "more_than": 0.1}, "not permitted"),
        ({"all": [{"fact": "x", "is": 1}]}, "no fact"),
        ({"all": [], "any": []}, "not permitted"),
        ({"not": 3}, "valid dictionary"),
    ],
)
def test_a_wrong_condition_is_refused_when_it_is_read(raw: Any, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        _READ.validate_python(raw)
