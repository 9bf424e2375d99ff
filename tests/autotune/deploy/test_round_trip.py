"""Any valid configuration survives its file, and none of its knobs vanishes on the way to vLLM."""

import json
import shlex
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.deploy.engine_launch import flag_words
from autotune.deploy.engine_yaml import read_knobs, render_engine_yaml
from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import (
    ServingEngine,
    load_serving_engine,
    serving_engines,
)
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.deploy.start_script import render_start_script
from autotune.deploy.translate import Translation, translate
from engine.config import KNOBS, MODEL_METHODS, EngineConfig, Knob


def values(knob: Knob) -> st.SearchStrategy[Any]:
    if knob.choices is not None:
        strategy: st.SearchStrategy[Any] = st.sampled_from(knob.choices)
    elif knob.type is bool:
        strategy = st.booleans()
    elif knob.type is int:
        strategy = st.integers(int(knob.minimum or 0), int(knob.maximum or 1 << 40))
    elif knob.type is float:
        strategy = st.floats(knob.minimum, knob.maximum)
    else:
        strategy = st.text(max_size=30)
    return st.none() | strategy if knob.optional else strategy


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    chosen = {name: draw(values(knob)) for name, knob in KNOBS.items()}
    least = chosen["max_num_seqs"]
    if not chosen["enable_chunked_prefill"] and chosen["max_model_len"] is not None:
        chosen["max_model_len"] = min(chosen["max_model_len"], 1 << 20)
        least = max(least, chosen["max_model_len"])
    if chosen["speculative_method"] in MODEL_METHODS and chosen["speculative_model"] is None:
        chosen["speculative_model"] = draw(st.text(max_size=30))
    pair = sorted((chosen["prompt_lookup_min"], chosen["prompt_lookup_max"]))
    chosen["prompt_lookup_min"], chosen["prompt_lookup_max"] = pair
    least = max(least, chosen["num_speculative_tokens"] + 1)
    chosen["max_num_batched_tokens"] = max(chosen["max_num_batched_tokens"], least)
    return EngineConfig(**chosen)


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    names = draw(st.sets(st.sampled_from(sorted(KNOBS))))
    return Evidence(
        # What a person typed may hold anything; in a comment it must stay a comment.
        summary=tuple(draw(st.lists(st.text(max_size=200), max_size=3))),
        changes={name: (KNOBS[name].default, draw(values(KNOBS[name]))) for name in names},
        importances={name: draw(st.floats(0, 1)) for name in names},
        trials=tuple(draw(st.lists(st.integers(0, 999), max_size=4))),
        device=draw(st.sampled_from(["cpu", "cuda"])),
    )


@settings(deadline=None)
@given(configs(), evidence())
def test_engine_yaml_reads_back_as_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, config: EngineConfig, found: Evidence
) -> None:
    path = tmp_path_factory.getbasetemp() / "engine.yaml"
    path.write_bytes(render_engine_yaml(config, found).encode())
    assert EngineConfig.from_mapping(read_knobs(path)) == config
    assert set(read_knobs(path)) == set(KNOBS)


def flags_of(script: str) -> list[str]:
    """The words between `flags=(` and `)`, as a shell reads them."""
    body = script.split("\nflags=(\n")[1].split("\n)\n")[0]
    return shlex.split(body, comments=True)


def launch_flags(engine: ServingEngine, result: Translation) -> list[str]:
    flags = result.flags().items()
    return [word for key, value in flags for word in flag_words(engine, key, value)]


@pytest.mark.parametrize("name", serving_engines())
@settings(max_examples=30, deadline=None)
@given(config=configs(), found=evidence())
def test_every_knob_that_is_set_goes_somewhere_once(
    name: str, config: EngineConfig, found: Evidence
) -> None:
    engine = load_serving_engine(name)
    result = translate(config, engine, found.device)
    placed = [item.knob for part in (result.entries, result.lost, result.unneeded) for item in part]
    assert sorted(placed) == sorted(k for k, v in config.to_dict().items() if v is not None)
    if engine.file is None:
        text = render_start_script(engine, result, found)
        assert flags_of(text) == launch_flags(engine, result)
    else:
        text = render_serving_yaml(engine, config, found)
        assert yaml.safe_load(text) == result.settings()
    for left in (*result.lost, *result.unneeded):
        assert f"# - {left.knob}:" in text  # a long value goes on in the next line


@settings(max_examples=50, deadline=None)
@given(config=configs(), limit=st.integers(1, 1 << 20), device=st.sampled_from(["cpu", "cuda"]))
def test_what_vllm_refuses_is_never_written(config: EngineConfig, limit: int, device: str) -> None:
    """The validators of vLLM's scheduler and attention, restated here from its source."""
    measured = {"max_model_len": limit}
    result = translate(config, load_serving_engine("vllm"), device, measured)
    keys = {entry.key: entry.value for entry in result.entries}
    model_len = keys.get("max-model-len", limit)
    assert keys["max-num-batched-tokens"] >= keys["max-num-seqs"]
    assert keys["long-prefill-token-threshold"] <= model_len
    assert keys["block-size"] % (32 if device == "cpu" else 16) == 0
    assert keys.get("scheduling-policy", "fcfs") in ("fcfs", "priority")
    assert "quantization" not in keys
    # A config file's `false` and `null` do not reach the parser of a subcommand.
    assert all(value is not False and value is not None for value in keys.values())
    assert 0 <= keys["watermark"] < 1
    drafting = json.loads(result.settings().get("speculative-config", "null"))
    if drafting is not None:
        assert drafting["method"] in ("ngram", "suffix", "draft_model")
        assert 0 < drafting["num_speculative_tokens"] <= 128
        assert ("model" in drafting) == (drafting["method"] == "draft_model")
        assert ("prompt_lookup_min" in drafting) == (drafting["method"] == "ngram")
        if drafting["method"] == "ngram":
            assert 0 < drafting["prompt_lookup_min"] <= drafting["prompt_lookup_max"]
