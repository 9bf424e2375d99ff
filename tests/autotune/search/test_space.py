from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from autotune.embedded import DRAFT, TARGET
from autotune.errors import BadInput
from autotune.search.space import SearchSpace, load_space
from engine.config import KNOBS, EngineConfig

DEFAULT = EngineConfig(model="m")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shipped_spaces_offer_only_tunable_knobs_with_values_that_the_engine_takes(
    device: str,
) -> None:
    space = load_space(device, {})
    for name, values in space.values.items():
        assert KNOBS[name].tunable
        assert device in KNOBS[name].devices
        for value in values:
            others: dict[str, object] = {"max_num_batched_tokens": 1 << 20}
            others |= {"speculative_model": "draft"} | {name: value}
            DEFAULT.replace(**others)


def test_default_is_the_first_seed_and_each_other_moves_one_knob() -> None:
    space = load_space("cpu", {}).nearest(DEFAULT)
    (source, start), *others = space.seeds(DEFAULT)
    assert source == "default"
    assert space.config_of(start, DEFAULT) == DEFAULT
    for _, point in others:
        assert sum(point[name] != start[name] for name in point) == 1
    assert {KNOBS[n].reload for n in others[0][1] if others[0][1][n] != start[n]} == {"weights"}


def test_space_is_widened_by_the_users_own_default() -> None:
    mine = DEFAULT.replace(max_num_seqs=24)
    space = load_space("cpu", {}).nearest(mine)
    assert 24 in space.values["max_num_seqs"]
    assert list(space.values["max_num_seqs"]) == sorted(space.values["max_num_seqs"])
    assert space.point_of(mine) is not None


def test_single_value_takes_a_knob_out() -> None:
    space = load_space("cpu", {"quantization": ["none"], "block_size": [64, 16]})
    assert "quantization" not in space.values
    assert space.values["block_size"] == (16, 64)


@pytest.mark.parametrize(
    ("narrowing", "message"),
    [
        ({"bloc_size": [16]}, "did you mean block_size"),
        ({"model": ["a", "b"]}, "is not a knob that a search on cpu may choose"),
        ({"gpu_memory_utilization": [0.8, 0.9]}, "is not a knob that a search on cpu may choose"),
        ({"block_size": []}, "at least one value"),
        ({"block_size": [7]}, "block_size=7 is not one of"),
        ({"max_num_seqs": ["many"]}, "max_num_seqs must be of type int"),
        ({"max_num_seqs": [0, 8]}, "at least 1"),
    ],
)
def test_bad_narrowing_is_named(narrowing: dict[str, list[object]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_space("cpu", narrowing)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "quantization: none", "{", "\x00", "no_such: [1]", "block_size: [16, x]"]
)
def test_bad_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"space\.yaml"):
        load_space("cpu", {}, file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.yaml"):
        load_space("cpu", {}, tmp_path / "absent.yaml")


def test_size_is_the_number_of_points() -> None:
    assert SearchSpace({"block_size": (16, 32), "quantization": ("none", "int8", "int4")}).size == 6


SPECULATIVE = SearchSpace(
    {
        "max_num_seqs": (16, 256),
        "speculative_method": ("none", "ngram", "draft_model"),
        "num_speculative_tokens": (2, 4, 8),
        "prompt_lookup_max": (4, 8),
    }
)


def test_points_that_are_the_same_engine_are_one_point() -> None:
    combinations = [
        dict(zip(SPECULATIVE.values, values, strict=True))
        for values in itertools.product(*SPECULATIVE.values.values())
    ]
    points = {str(SPECULATIVE.normalised(point, DEFAULT)) for point in combinations}
    # Without drafts 2; with lookup 2 x 3 x 2, with a draft model 2 x 3.
    assert len(points) == SPECULATIVE.size == 2 + 12 + 6
    idle = {"speculative_method": "none", "num_speculative_tokens": 8, "prompt_lookup_max": 8}
    assert SPECULATIVE.config_of(idle, DEFAULT) == DEFAULT
    mine = DEFAULT.replace(num_speculative_tokens=2)
    assert SPECULATIVE.config_of(idle, mine) == mine


def test_a_point_and_its_config_are_each_others() -> None:
    space = SPECULATIVE.nearest(DEFAULT)
    base = EngineConfig(model=str(TARGET))
    for values in itertools.product(*space.values.values()):
        point = space.normalised(dict(zip(space.values, values, strict=True)), base)
        assert space.point_of(space.config_of(point, base)) == point


def test_a_point_that_drafts_with_a_model_has_the_one_that_is_known() -> None:
    embedded = EngineConfig(model=str(TARGET))
    point = {"speculative_method": "draft_model", "num_speculative_tokens": 4}
    assert SPECULATIVE.config_of(point, embedded).speculative_model == str(DRAFT)
    given = DEFAULT.replace(speculative_model="small")
    assert SPECULATIVE.config_of(point, given).speculative_model == "small"
    assert SPECULATIVE.config_of({"speculative_method": "none"}, given) == given


def test_knobs_that_nothing_heeds_are_left_out() -> None:
    only_none = load_space("cpu", {"speculative_method": ["none"]}).nearest(DEFAULT)
    assert not [name for name in only_none.values if "specul" in name or "lookup" in name]
    drafting = DEFAULT.replace(speculative_method="ngram")
    kept = load_space("cpu", {"speculative_method": ["ngram"]}).nearest(drafting)
    assert {"num_speculative_tokens", "prompt_lookup_max"} < set(kept.values)
    models = load_space("cpu", {"speculative_method": ["none", "medusa"]}).nearest(DEFAULT)
    assert "num_speculative_tokens" in models.values
    assert "prompt_lookup_max" not in models.values


def test_seeds_move_what_drafting_heeds_only_where_the_default_drafts() -> None:
    def moved(base: EngineConfig) -> set[str]:
        (_, start), *others = SPECULATIVE.nearest(base).seeds(base)
        return {name for _, point in others for name in point if point[name] != start[name]}

    assert moved(DEFAULT) == {"max_num_seqs", "speculative_method"}
    drafting = DEFAULT.replace(speculative_method="draft_model", speculative_model="small")
    assert moved(drafting) == {"max_num_seqs", "speculative_method", "num_speculative_tokens"}
