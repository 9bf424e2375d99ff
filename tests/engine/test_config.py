import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import KNOBS, RELOAD_ORDER, EngineConfig
from engine.errors import ConfigError


def test_every_field_is_a_described_knob() -> None:
    assert list(KNOBS) == [field.name for field in dataclasses.fields(EngineConfig)]
    for knob in KNOBS.values():
        assert knob.help.endswith(".")
        assert knob.reload in RELOAD_ORDER
        assert set(knob.devices) <= {"cpu", "cuda"}
        assert knob.devices
        assert knob.flag == "--" + knob.name.replace("_", "-")
        assert (knob.default is None) <= knob.optional


def test_numbers_that_a_search_may_choose_have_a_unit_or_are_shares() -> None:
    for knob in KNOBS.values():
        if knob.tunable and knob.type is int:
            assert knob.unit, knob.name


# What a value at its bound needs of other knobs, so that it is the bound that is tried.
BESIDE: dict[str, dict[str, Any]] = {
    "max_num_seqs": {"max_num_batched_tokens": 1 << 20},
    "max_num_batched_tokens": {"max_num_seqs": 1},
    "prompt_lookup_min": {"prompt_lookup_max": 32},
    "prompt_lookup_max": {"prompt_lookup_min": 1},
    "speculative_method": {"speculative_model": "draft"},
}


@pytest.mark.parametrize("knob", KNOBS.values(), ids=lambda knob: knob.name)
def test_bounds_are_inclusive_and_what_lies_beyond_is_refused(knob) -> None:  # type: ignore[no-untyped-def]
    others = BESIDE.get(knob.name, {})
    step = 1 if knob.type is int else 1e-9
    for bound, beyond in ((knob.minimum, -step), (knob.maximum, step)):
        if bound is None or knob.choices is not None:
            continue
        EngineConfig(**{**others, knob.name: knob.type(bound)})
        with pytest.raises(ConfigError, match=knob.name):
            EngineConfig(**{**others, knob.name: knob.type(bound) + beyond})


@pytest.mark.parametrize("knob", KNOBS.values(), ids=lambda knob: knob.name)
def test_values_of_another_type_are_refused(knob) -> None:  # type: ignore[no-untyped-def]
    wrong = {int: [True, "1", 1.5], float: ["0.1", True], str: [1, b"x"], bool: [1, "true"]}
    for value in [*wrong[knob.type], [], *([] if knob.optional else [None])]:
        with pytest.raises(ConfigError, match=f"{knob.name} must be of type {knob.type.__name__}"):
            EngineConfig(**{knob.name: value})


@pytest.mark.parametrize("name", [n for n, k in KNOBS.items() if k.choices is not None])
def test_choices_are_listed_when_another_is_given(name: str) -> None:
    for choice in KNOBS[name].choices or ():
        EngineConfig(**{**BESIDE.get(name, {}), name: choice})
    wrong = 7 if KNOBS[name].type is int else "nonsense"
    with pytest.raises(ConfigError, match=f"{name}={wrong!r} is not one of .*{choice}"):
        EngineConfig(**{name: wrong})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gpu_memory_utilization", "watermark", "max_queue_delay"])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})


def test_contradictions_say_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=8 is below max_num_seqs=9"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)
    EngineConfig(max_num_batched_tokens=9, max_num_seqs=9)
    with pytest.raises(ConfigError, match=r"without chunks a prompt must fit in one step"):
        EngineConfig(enable_chunked_prefill=False, max_model_len=4096, max_num_batched_tokens=2048)
    EngineConfig(enable_chunked_prefill=False, max_model_len=2048, max_num_batched_tokens=2048)


def test_the_fewest_tokens_to_look_up_are_not_more_than_the_most() -> None:
    with pytest.raises(ConfigError, match=r"prompt_lookup_min=5 is above prompt_lookup_max=4"):
        EngineConfig(prompt_lookup_min=5)
    EngineConfig(prompt_lookup_min=5, prompt_lookup_max=5)


def test_a_draft_and_the_token_before_it_fit_one_step() -> None:
    tight: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 4}
    with pytest.raises(ConfigError, match=r"num_speculative_tokens=4 does not fit .*tokens=4"):
        EngineConfig(**tight, speculative_method="ngram", num_speculative_tokens=4)
    EngineConfig(**tight, speculative_method="ngram", num_speculative_tokens=3)
    EngineConfig(**tight, num_speculative_tokens=4)  # nothing is drafted


@pytest.mark.parametrize("method", ["draft_model", "medusa"])
def test_a_method_with_weights_of_its_own_needs_their_folder(method: str) -> None:
    with pytest.raises(ConfigError, match=f"speculative_method={method} needs speculative_model"):
        EngineConfig(speculative_method=method)
    EngineConfig(speculative_method=method, speculative_model="folder")


def test_unknown_knobs_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown knob 'max_num_seq'; did you mean max_num_seqs"):
        EngineConfig.from_mapping({"max_num_seq": 4})
    with pytest.raises(ConfigError, match=r"unknown knob 'zzz'$"):
        EngineConfig().replace(zzz=1)


def test_whole_numbers_are_read_as_json_and_yaml_write_them() -> None:
    config = EngineConfig.from_mapping({"watermark": 0, "block_size": 32.0})
    assert config.watermark == 0.0
    assert type(config.watermark) is float
    assert type(config.block_size) is int
    with pytest.raises(ConfigError, match="block_size"):
        EngineConfig.from_mapping({"block_size": 32.5})


configs = st.builds(
    EngineConfig.from_mapping,
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.text(max_size=5),
            "block_size": st.sampled_from([8, 128]),
            "max_num_seqs": st.integers(1, 512),
            "watermark": st.floats(0, 0.5),
            "kv_cache_memory_bytes": st.one_of(st.none(), st.integers(1, 1 << 40)),
            "scheduling_policy": st.sampled_from(["fcfs", "sjf"]),
            "quantization": st.sampled_from(["none", "int8", "int4"]),
        },
    ),
)


@given(configs)
def test_a_config_survives_json(config: EngineConfig) -> None:
    assert EngineConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


@given(configs, configs)
def test_a_reload_costs_what_its_dearest_knob_costs(a: EngineConfig, b: EngineConfig) -> None:
    changed = {n for n in KNOBS if getattr(a, n) != getattr(b, n)}
    costs = {KNOBS[n].reload for n in changed}
    expected = next((c for c in ("weights", "cache", "live") if c in costs), None)
    assert a.reload_needed(b) == b.reload_needed(a) == expected


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_num_seqs = 3  # type: ignore[misc]
