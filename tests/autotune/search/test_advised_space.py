"""Which points advice puts first, and what it takes from a search space and adds to it."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.search.advised_space import advised_seeds, advised_space
from autotune.search.methods_offered import Offer
from autotune.search.space import SearchSpace
from engine.config import EngineConfig

BASE = EngineConfig(model="m", device="cpu", max_num_seqs=64)
SPACE = SearchSpace(
    {
        "quantization": ("none", "int8"),
        "max_num_seqs": (16, 64),
        "enable_prefix_caching": (False, True),
    }
)
OFFER = Offer({"quantization": ("none", "int8", "int4")})


def item(technique: str = "t", *, testable: bool = True, **knobs: Any) -> dict[str, Any]:
    return {"technique": technique, "testable": testable, "knobs": knobs, "opens": {}}


def opening(**opens: Any) -> dict[str, Any]:
    return {**item(), "opens": opens}


def test_advice_is_followed_one_piece_at_a_time_in_its_order() -> None:
    advice = [
        item("fewer-seats", max_num_seqs=16),
        item("as-it-is", max_num_seqs=64),
        item("distil", testable=False),
        item("same-again", max_num_seqs=16),
        item("two-knobs", quantization="int8", enable_prefix_caching=False),
        item("not-in-the-space", quantization="int4"),
    ]
    start = {"quantization": "none", "max_num_seqs": 64, "enable_prefix_caching": True}
    assert advised_seeds(SPACE, BASE, advice) == [
        ("advice: fewer-seats", {**start, "max_num_seqs": 16}),
        (
            "advice: two-knobs",
            {**start, "quantization": "int8", "enable_prefix_caching": False},
        ),
    ]


def test_of_equally_fast_methods_the_one_without_calibration_is_tried() -> None:
    space = SearchSpace({**SPACE.values, "quantization": ("none", "int8", "smoothquant", "int4")})
    names = ["smoothquant", "int4", "int8"]
    advice = [item(name, quantization=name) for name in names]
    seeds = advised_seeds(space, BASE, advice)
    # In the place of the first of them, which was ranked so for its speed.
    assert [source for source, _ in seeds] == ["advice: int8", "advice: int4"]
    alone = advised_seeds(space, BASE, advice[:1])
    assert [source for source, _ in alone] == ["advice: smoothquant"]
    # The default's own speed is nothing to try.
    base = BASE.replace(quantization="int8")
    assert [s for s, _ in advised_seeds(space, base, advice)] == ["advice: int4"]


def test_a_knob_that_cannot_matter_stays_as_the_default_has_it() -> None:
    why = {"enable_prefix_caching": "no two prompts begin alike", "block_size": "not searched"}
    made = advised_space(SPACE, BASE, [], why, OFFER, ())
    assert set(made.space.values) == {"quantization", "max_num_seqs"}
    assert made.fixed == {"enable_prefix_caching": "no two prompts begin alike"}
    assert made.notes == ["enable_prefix_caching is not searched: no two prompts begin alike"]
    assert made.space.point_of(BASE) is not None


def test_what_the_user_asked_for_and_what_is_advised_is_searched_whatever_a_profile_says() -> None:
    why = dict.fromkeys(SPACE.values, "it cannot matter")
    advice = [item(max_num_seqs=16)]
    made = advised_space(SPACE, BASE, advice, why, OFFER, {"quantization"})
    assert set(made.space.values) == {"quantization", "max_num_seqs"}


def test_values_that_advice_sets_or_opens_join_the_space_in_order() -> None:
    advice = [item(quantization="int4"), opening(max_num_seqs=(8, 32), block_size=(32,))]
    made = advised_space(SPACE, BASE, advice, {}, OFFER, ())
    assert made.space.values["max_num_seqs"] == (8, 16, 32, 64)
    assert made.space.values["quantization"] == ("none", "int8", "int4")
    assert made.space.values["block_size"] == (16, 32)
    assert made.opened == {
        "quantization": ("int4",),
        "max_num_seqs": (8, 32),
        "block_size": (32,),
    }
    assert made.space.point_of(BASE) is not None
    assert "max_num_seqs may also be 8, 32, as is advised" in made.notes


@pytest.mark.parametrize(
    "advice",
    [
        opening(max_num_seqs=(-3,)),  # refused by the engine
        opening(speculative_frobs=(2,)),  # no knob
        opening(seed=(7,)),  # not tunable
        opening(quantization=("fp8",)),  # not offered on this device
        opening(max_num_seqs=(64,)),  # the default
        {**opening(max_num_seqs=(8,)), "testable": False},
    ],
)
def test_values_that_this_device_cannot_be_set_to_are_not_opened(advice: dict[str, Any]) -> None:
    assert advised_space(SPACE, BASE, [advice], {}, OFFER, ()).space == SPACE


def test_a_knob_that_the_user_fixed_is_not_opened() -> None:
    made = advised_space(SPACE, BASE, [opening(block_size=(8,))], {}, OFFER, {"block_size"})
    assert "block_size" not in made.space.values


def test_a_value_may_join_one_that_the_engine_chooses_for_itself() -> None:
    space = advised_space(SPACE, BASE, [item(kv_cache_memory_bytes=2**33)], {}, OFFER, ()).space
    assert space.values["kv_cache_memory_bytes"] == (None, 2**33)
    start = space.point_of(BASE)
    assert start is not None
    assert start["kv_cache_memory_bytes"] is None
