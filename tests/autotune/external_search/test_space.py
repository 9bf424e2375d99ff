from __future__ import annotations

from pathlib import Path

import pytest

from autotune.errors import BadInput
from autotune.external.table import load_table
from autotune.external_search.space import (
    FlagConfig,
    default_config,
    fixed_values,
    knob_name,
    load_flag_space,
)

VLLM = load_table("vllm")


def test_the_default_gives_the_engine_nothing_but_what_is_fixed() -> None:
    space = load_flag_space(VLLM, "cpu", {}, fixed={"block_size": 64})
    base = default_config(VLLM, "cpu", {"block_size": 64}, list(space.values))
    assert base.given(VLLM, "cpu") == {"block_size": 64}
    assert base.values["max_num_seqs"] == 128
    assert "block_size" not in space.values
    assert space.point_in({}, base) is not None


def test_what_may_change_answers_is_searched_only_when_asked_for() -> None:
    assert "kv_cache_dtype" not in load_flag_space(VLLM, "cpu", {}).values
    assert "kv_cache_dtype" in load_flag_space(VLLM, "cpu", {}, lossy=True).values


def test_seeds_move_one_knob_and_what_it_needs() -> None:
    space = load_flag_space(VLLM, "cpu", {})
    base = default_config(VLLM, "cpu", {}, list(space.values))
    seeds = dict(space.seeds(base))
    start = seeds["default"]
    drafting = seeds["extreme: speculative_method=ngram"]
    changed = {name for name in start if drafting[name] != start[name]}
    # How many tokens are drafted has no default, and vLLM refuses a method without it.
    assert changed == {"speculative_method", "num_speculative_tokens"}
    for name, point in seeds.items():
        assert space.refusal(point, base) is None, name


def test_no_candidate_is_refused_and_none_comes_twice() -> None:
    space = load_flag_space(VLLM, "cpu", {})
    base = default_config(VLLM, "cpu", {}, list(space.values))
    points = space.candidates(base, 200, 3, list(space.values))
    assert len(points) == 200
    assert len({str(sorted(p.items(), key=lambda i: i[0])) for p in points}) == 200
    for point in points:
        assert space.refusal(point, base) is None
        assert space.normalised(point, base) == point
    assert any(point["speculative_method"] == "ngram" for point in points)


def test_a_small_space_is_thought_of_whole() -> None:
    space = load_flag_space(
        VLLM,
        "cpu",
        {
            **{name: [value] for name, value in VLLM.defaults("cpu").items()},
            "max_num_seqs": [16, 64],
            "max_num_batched_tokens": [32, 2048],
            "speculative_method": ["none"],
            "num_speculative_tokens": [4],
        },
    )
    base = default_config(VLLM, "cpu", {}, list(space.values))
    # 16, 64 and the default 128, by 32 and 2048; a step of 32 tokens has no room for 64 sequences.
    points = space.candidates(base, 100, 0, list(space.values))
    pairs = {(p["max_num_seqs"], p["max_num_batched_tokens"]) for p in points}
    assert pairs == {(16, 32), (16, 2048), (64, 2048), (128, 2048)}
    one = space.candidates(base, 100, 0, ["max_num_seqs"])
    assert [p["max_num_batched_tokens"] for p in one] == [2048] * 3


def test_neighbours_differ_in_one_step() -> None:
    space = load_flag_space(VLLM, "cpu", {})
    base = default_config(VLLM, "cpu", {}, list(space.values))
    start = space.point_in({}, base)
    assert start is not None
    seqs = {p["max_num_seqs"] for p in space.neighbours(start, base)}
    assert seqs == {64, 128, 256}


@pytest.mark.parametrize(
    "given",
    ["max_num_seqs", "max-num-seqs", "--max-num-seqs", " max_num_seqs "],
)
def test_knobs_are_found_by_any_spelling(given: str) -> None:
    assert knob_name(VLLM, given) == "max_num_seqs"


def test_the_bundled_engines_name_is_understood() -> None:
    table = load_table("vllm")
    knob = table.knobs["max_num_seqs"]
    renamed = table.model_copy(
        update={"knobs": {"most_sequences": knob}, "rules": (), "length": table.length}
    )
    assert knob_name(renamed, "max_num_seqs") == "most_sequences"


def test_what_is_narrowed_to_one_value_is_fixed() -> None:
    narrowing = {"max-num-seqs": [32], "block_size": [32, 64]}
    assert fixed_values(VLLM, {"watermark": 0.1}, narrowing) == {
        "max_num_seqs": 32,
        "watermark": 0.1,
    }
    assert "max_num_seqs" not in load_flag_space(VLLM, "cpu", narrowing).values


@pytest.mark.parametrize(
    ("narrowing", "said"),
    [
        ({"max_num_sqs": [1, 2]}, "did you mean max_num_seqs"),
        ({"max_num_seqs": [0, 4]}, "0 is below 1"),
        ({"max_num_seqs": ["many", 4]}, "'many' is no int"),
        ({"async_scheduling": [True, False]}, "only on cuda"),
        ({"max_num_seqs": "8"}, "must list"),
    ],
)
def test_bad_values_are_told(narrowing: dict[str, list[object]], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load_flag_space(VLLM, "cpu", narrowing)


def test_words_that_yaml_reads_as_something_else_are_taken_as_meant(tmp_path: Path) -> None:
    llamacpp = load_table("llamacpp")
    told = fixed_values(llamacpp, {"gpu_layers": 99}, {"flash_attn": [True]})
    assert told == {"gpu_layers": "99", "flash_attn": "on"}
    path = tmp_path / "space.yaml"
    path.write_text("flash-attn: [on, off]\ncont_batching: [on, off]\n")
    assert dict(load_flag_space(llamacpp, "cpu", {}, path).values) == {
        "flash_attn": ("auto", "on", "off"),
        "cont_batching": (True, False),
    }
    assert fixed_values(VLLM, {"cpu_omp_threads_bind": 0}, {}) == {"cpu_omp_threads_bind": "0"}
    with pytest.raises(BadInput, match="dtype: True is no str"):
        load_flag_space(VLLM, "cpu", {"dtype": [True, "auto"]})


def test_a_space_file_replaces_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("max-num-seqs: [8, 16]\n")
    assert dict(load_flag_space(VLLM, "cpu", {}, path).values) == {"max_num_seqs": (8, 16, 128)}
    path.write_text("[8]\n")
    with pytest.raises(BadInput, match="must map knobs"):
        load_flag_space(VLLM, "cpu", {}, path)


def test_a_truth_is_no_number() -> None:
    config = FlagConfig({"enable_prefix_caching": False, "long_prefill_token_threshold": 0})
    assert config.given(VLLM, "cpu") == {"enable_prefix_caching": False}
