from __future__ import annotations

from pathlib import Path

import pytest

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
            DEFAULT.replace(**{name: value, "max_num_batched_tokens": 1 << 20} | {name: value})


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
