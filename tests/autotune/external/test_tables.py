"""The tables of engines that are tuned: they load, and wrong ones are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from autotune.errors import AutotuneError
from autotune.external.flags import (
    flags_of,
    idle_knobs,
    problems_of,
    with_length,
)
from autotune.external.table import (
    DEVICES,
    EngineTable,
    Value,
    engine_tables,
    load_table,
    read_table,
)
from tests.autotune.external.fake_vllm import _parser

VLLM, SGLANG, LLAMACPP = (load_table(name) for name in ("vllm", "sglang", "llamacpp"))


@pytest.mark.parametrize("name", engine_tables())
def test_every_value_that_is_searched_is_accepted_alone(name: str) -> None:
    table = load_table(name)
    assert table.engine == name
    for device in DEVICES:
        defaults = table.defaults(device)
        assert not problems_of(table, defaults, device)
        searched = table.searched(device, lossy=True)
        assert set(table.searched(device)) < set(searched) or name == "sglang"
        for knob, values in searched.items():
            assert len(values) == len(set(map(repr, values))) > 1
            if knob in defaults and table.knobs[knob].kind == "bool":
                assert defaults[knob] in values


def test_knobs_that_change_answers_are_searched_only_if_allowed() -> None:
    assert "kv_cache_dtype" not in VLLM.searched("cpu")
    assert VLLM.searched("cpu", lossy=True)["kv_cache_dtype"] == ("auto", "fp8")


def test_how_vllm_is_told() -> None:
    values: dict[str, Value] = {
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "watermark": 0.02,
        "speculative_method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 8,
        "cpu_num_of_reserved_cpu": 0,
    }
    flags = flags_of(VLLM, values, "cpu")
    assert flags.arguments == (
        *("--max-num-seqs", "32"),
        "--no-enable-prefix-caching",
        *("--watermark", "0.02"),
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 8}',
    )
    assert flags.environment == {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    assert flags.request_fields == {}


def test_what_does_nothing_is_not_told() -> None:
    values: dict[str, Value] = {"speculative_method": "none", "num_speculative_tokens": 4}
    assert idle_knobs(VLLM, values, "cpu") == {"num_speculative_tokens"}
    assert flags_of(VLLM, values, "cpu").arguments == ()
    on = {**values, "speculative_method": "ngram"}
    assert not idle_knobs(VLLM, on, "cpu")
    assert flags_of(VLLM, on, "cpu").arguments


def test_truths_of_sglang_and_llama_cpp() -> None:
    values: dict[str, Value] = {"disable_radix_cache": True, "enable_mixed_chunk": False}
    assert flags_of(SGLANG, values, "cuda").arguments == ("--disable-radix-cache",)
    told = flags_of(LLAMACPP, {"cache_prompt": False, "kv_unified": True}, "cpu")
    assert told.arguments == ("--kv-unified", "--no-cache-prompt")
    assert told.request_fields == {"cache_prompt": False}


def test_the_order_of_values_makes_no_other_command_line() -> None:
    values: dict[str, Value] = {"batch_size": 512, "ubatch_size": 256}
    told = flags_of(LLAMACPP, values, "cpu")
    assert told.arguments == ("--batch-size", "512", "--ubatch-size", "256")
    assert flags_of(LLAMACPP, dict(reversed(values.items())), "cpu") == told


def test_only_what_goes_with_requests_needs_no_restart() -> None:
    assert [n for n, knob in LLAMACPP.knobs.items() if not knob.restarts] == ["cache_prompt"]
    assert all(knob.restarts for table in (VLLM, SGLANG) for knob in table.knobs.values())


def test_how_sglang_is_told_its_device() -> None:
    on_cpu, on_gpu = SGLANG.start("cpu"), SGLANG.start("cuda")
    assert on_cpu.arguments[: len(on_gpu.arguments)] == on_gpu.arguments
    assert on_cpu.arguments[len(on_gpu.arguments) :][:2] == ("--device", "cpu")
    assert (dict(on_cpu.environment), dict(on_gpu.environment)) == (
        {"SGLANG_USE_CPU_ENGINE": "1"},
        {},
    )


@pytest.mark.parametrize(
    ("table", "values", "words"),
    [
        (VLLM, {"max_num_seqs": 4096}, "room for a token of each sequence"),
        (VLLM, {"max_num_seqs": 0}, "max_num_seqs: 0 is below 1"),
        (VLLM, {"max_num_seqs": True}, "max_num_seqs: True is no int"),
        (VLLM, {"max_num_seqs": "8"}, "'8' is no int"),
        (VLLM, {"watermark": 1.0}, "1.0 is above 0.99"),
        (VLLM, {"watermark": float("nan")}, "nan is no finite number"),
        (VLLM, {"dtype": "int3"}, "'int3' is none of auto"),
        (VLLM, {"no_such": 1}, "no knob 'no_such'"),
        (VLLM, {"async_scheduling": True}, "async_scheduling only on cuda"),
        (VLLM, {"speculative_method": "ngram"}, "how many tokens are drafted"),
        (
            VLLM,
            {"enable_chunked_prefill": False, "max_model_len": 4096},
            "a step must hold the longest prompt",
        ),
        (VLLM, {"max_model_len": 100, "long_prefill_token_threshold": 128}, "may not be above"),
        (LLAMACPP, {"batch_size": 256, "ubatch_size": 512}, "than a batch holds"),
        (LLAMACPP, {"batch_size": 256}, "than a batch holds"),
        (LLAMACPP, {"flash_attn": "off", "cache_type_v": "q8_0"}, "need fused attention"),
    ],
)
def test_what_an_engine_would_refuse(table: EngineTable, values: Any, words: str) -> None:
    assert words in "; ".join(problems_of(table, values, "cpu"))


def test_rules_of_a_device() -> None:
    wrong: dict[str, Value] = {"page_size": 48, "chunked_prefill_size": 2048}
    assert problems_of(SGLANG, wrong, "cuda") == [
        "chunked_prefill_size must be a multiple of page_size "
        "(chunked_prefill_size=2048, page_size=48)"
    ]
    assert not problems_of(SGLANG, {**wrong, "chunked_prefill_size": -1}, "cuda")
    assert not problems_of(SGLANG, {"page_size": 48}, "cuda"), "the other is not known"
    both: dict[str, Value] = {"speculative_algorithm": "NGRAM", "enable_mixed_chunk": True}
    assert problems_of(SGLANG, both, "cuda")
    assert not problems_of(SGLANG, {**both, "enable_mixed_chunk": False}, "cuda")


def test_room_for_the_longest_request() -> None:
    assert with_length(VLLM, {}, 1000, "cpu") == {"max_model_len": 1000}
    assert with_length(VLLM, {"max_model_len": 64}, 1000, "cpu") == {"max_model_len": 64}
    assert with_length(LLAMACPP, {"parallel": 4}, 1000, "cpu") == {"parallel": 4, "ctx_size": 4000}


def test_the_fake_takes_what_vllm_takes() -> None:
    """Else a test against it would prove nothing of the table's spelling."""
    flags = {option for action in _parser()._actions for option in action.option_strings}
    of_table = {flag for k in VLLM.knobs.values() for flag in (k.flag, k.negated_flag) if flag}
    unknown = flags - of_table - {"-h", "--help", "--host", "--port", "--served-model-name"}
    assert unknown <= {"--no-enforce-eager"}


SOUND = """
engine: toy
title: Toy
program: toy
arguments: ["{model}"]
version: {arguments: [--version], pattern: '(.+)', checked: ["1"]}
health_path: /health
metrics_path: /metrics
start_limit_s: 1
stop_grace_s: 1
length: {knob: size}
knobs:
  size: {kind: int, help: a size, flag: --size, low: 1, search: [1, 2], default: 1}
failures: [{kind: crash, pattern: boom}]
"""


def test_a_sound_table_is_read() -> None:
    assert read_table(SOUND, "toy").searched("cpu") == {"size": (1, 2)}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("flag: --size, ", "", "one of flag, environment and request_field"),
        ("flag: --size", "flag: --size, environment: SIZE", "not both"),
        ("flag: --size", "flag: --size, negated_flag: --no-size", "only a truth"),
        ("flag: --size", "environment: SIZE, member: size", "a member belongs to a flag"),
        ("search: [1, 2]", "search: [0, 1]", "0 is below 1"),
        ("default: 1", "default: big", "'big' is no int"),
        ("default: 1", "default: 1, same_as: sizes", "'sizes' is no knob"),
        ("knob: size", "knob: length", "'length' is no knob of the table"),
        ("kind: int", "kind: number", "kind"),
        ("pattern: boom", "pattern: '(boom'", "broken"),
        ("kind: crash, pattern: boom", "kind: crash", "pattern"),
        ("title: Toy", "title: Toy\non_device: {tpu: {}}", "on_device"),
        ("failures:", "rules: [{why: because}]\nfailures:", "or a `when` alone"),
        ("failures:", "rules: [{why: because, needs: nothing}]\nfailures:", "'nothing' is no knob"),
        ("title: Toy", "title: Toy\nname: toy", "name"),
    ],
)
def test_a_broken_table_is_refused(old: str, new: str, words: str) -> None:
    assert old in SOUND
    with pytest.raises(AutotuneError, match=re.escape(words)):
        read_table(SOUND.replace(old, new, 1), "toy")


def test_no_value_of_a_table_is_what_yaml_made_of_a_word() -> None:
    """`on`, `off`, `no` and `yes` are truths to YAML where they stand without quotes."""
    for name in engine_tables():
        for knob_name, knob in load_table(name).knobs.items():
            for value in (*(knob.choices or ()), *knob.default.values()):
                assert isinstance(value, bool) == (knob.kind == "bool"), (name, knob_name)


def test_the_tables_are_strict_yaml() -> None:
    """A key given twice would silently lose the first."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice at line {node.start_mark.line}"
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    from importlib import resources

    for name in engine_tables():
        source = resources.files("search_spaces") / "engines" / "tuning" / f"{name}.yaml"
        yaml.load(source.read_text(encoding="utf-8"), Loader=Strict)
