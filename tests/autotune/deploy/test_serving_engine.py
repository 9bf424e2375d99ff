import json
from typing import Any

import pytest
from pydantic import ValidationError

from autotune.deploy.serving_engine import ServingEngine, load_serving_engine, serving_engines
from autotune.deploy.translate import Translation, translate
from autotune.errors import BadInput
from engine.config import KNOBS, EngineConfig

# Long flags read in vLLM's own argument parser.
VLLM_FLAGS = {
    "model", "tokenizer", "dtype", "seed", "max-model-len", "block-size",
    "gpu-memory-utilization", "kv-cache-memory-bytes", "enable-prefix-caching",
    "no-enable-prefix-caching", "max-num-seqs", "max-num-batched-tokens",
    "enable-chunked-prefill", "no-enable-chunked-prefill", "long-prefill-token-threshold",
    "scheduling-policy", "max-num-queued-reqs", "watermark", "kv-cache-dtype",
    "tensor-parallel-size", "enforce-eager", "speculative-config",
}  # fmt: skip


def table(**knobs: Any) -> dict[str, Any]:
    return {
        "engine": "other",
        "title": "Other",
        "version": "1.0",
        "checked": ["1.0"],
        "file": "other.yaml",
        "command": ["other", "{file}"],
        "knobs": knobs,
    }


@pytest.mark.parametrize("name", serving_engines())
def test_table_knows_every_knob(name: str) -> None:
    assert set(load_serving_engine(name).knobs) == set(KNOBS)


def test_vllm_is_there_and_its_keys_are_vllms() -> None:
    assert load_serving_engine("vllm").keys() == VLLM_FLAGS


def test_unknown_engine_is_refused_with_those_known() -> None:
    with pytest.raises(BadInput, match=r"'sglong'.*vllm"):
        load_serving_engine("sglong")


@pytest.mark.parametrize(
    "broken",
    [
        table(no_such_knob={"key": "x"}),
        table(block_size={}),
        table(block_size={"key": "x", "lost": "and gone"}),
        table(block_size={"key": "x", "kee": "y"}),
        table(block_size={"key": "x", "env": "Y"}),
        table(block_size={"key": "x", "convert": "no_such_conversion"}),
        table(block_size={"convert": {"x": "no_such_conversion"}}),
        table(block_size={"carried_by": "no_such_knob"}),
        table(block_size={"key_by": {"knob": "no_such_knob", "keys": {"a": "x"}}}),
        table(block_size={"key": "x", "rules": [{"when": 8, "lost": "?", "beside": {"y": 1}}]}),
        {**table(), "command": ["other"]},
        {**table(), "file": None},
        table(block_size={"key": "x", "plus": "no_such_knob"}),
        table(block_size={"lost": "gone", "member": "y"}),
        table(block_size={"key": "x", "only_with": {"knob": "zzz", "among": [], "otherwise": "?"}}),
        table(block_size={"key": "x", "rules": [{"when": 8}]}),
        table(block_size={"key": "x", "rules": [{"when": 8, "use": 16, "lost": "?"}]}),
        table(block_size={"key": "x", "rules": [{"when": 8, "use": 16, "on": "tpu"}]}),
    ],
)
def test_broken_tables_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServingEngine.model_validate(broken)


def test_a_knob_that_the_table_does_not_know_is_told() -> None:
    engine = ServingEngine.model_validate(table(model={"key": "weights"}))
    result = translate(EngineConfig(model="m"), engine, "cpu")
    assert [(e.key, e.value) for e in result.entries] == [("weights", "m")]
    assert {left.knob for left in result.lost} >= {"block_size", "max_num_seqs"}


def test_rules_tell_true_from_one() -> None:
    engine = ServingEngine.model_validate(
        table(
            enable_prefix_caching={"key": "p", "rules": [{"when": 1, "use": "one"}]},
            block_size={"key": "b", "rules": [{"when": 16, "on": "cuda", "use": 99}]},
        )
    )
    on_cpu = {e.key: e.value for e in translate(EngineConfig(), engine, "cpu").entries}
    on_gpu = {e.key: e.value for e in translate(EngineConfig(), engine, "cuda").entries}
    assert on_cpu == {"p": True, "b": 16}
    assert on_gpu == {"p": True, "b": 99}


def test_knobs_that_share_a_key_are_members_of_its_json() -> None:
    engine = ServingEngine.model_validate(
        table(
            speculative_method={"key": "spec", "member": "how"},
            num_speculative_tokens={"key": "spec", "member": "most"},
            block_size={"key": "b"},
        )
    )
    settings = translate(EngineConfig(speculative_method="ngram"), engine, "cpu").settings()
    assert settings["b"] == 16
    assert json.loads(settings["spec"]) == {"how": "ngram", "most": 4}
    # Nothing is drafted: what belongs to drafting is idle.
    result = translate(EngineConfig(), engine, "cpu")
    assert json.loads(result.settings()["spec"]) == {"how": "none"}
    idle = {left.knob: left.reason for left in result.unneeded}
    assert idle["num_speculative_tokens"] == "has no effect while speculative_method is none"


def speculating(**knobs: Any) -> Translation:
    return translate(EngineConfig(**knobs), load_serving_engine("vllm"), "cuda")


def test_lookup_and_a_draft_model_are_vllms_own() -> None:
    knobs: dict[str, Any] = {"num_speculative_tokens": 5, "prompt_lookup_max": 6}
    ngram = speculating(speculative_method="ngram", **knobs).settings()["speculative-config"]
    assert json.loads(ngram) == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 6,
    }
    knobs |= {"speculative_method": "draft_model", "speculative_model": "small"}
    draft = speculating(**knobs).settings()["speculative-config"]
    assert json.loads(draft) == {
        "method": "draft_model",
        "model": "small",
        "num_speculative_tokens": 5,
    }


def test_what_vllm_does_otherwise_when_it_drafts_is_told() -> None:
    lost = {left.knob: left.reason for left in speculating(speculative_method="suffix").lost}
    assert set(lost) == {"speculative_adaptive", "prompt_lookup_min", "prompt_lookup_max"}
    assert "num_speculative_tokens_per_batch_size" in lost["speculative_adaptive"]
    fixed = speculating(speculative_method="ngram", speculative_adaptive=False)
    assert not fixed.lost
    window = speculating(speculative_method="ngram", prompt_lookup_window=512)
    assert "prompt_lookup_window" in {left.knob for left in window.lost}


def test_medusa_heads_are_lost_with_what_would_be_next_best() -> None:
    result = speculating(speculative_method="medusa", speculative_model="heads")
    assert "speculative-config" not in result.settings()
    lost = {left.knob: left.reason for left in result.lost}
    assert "eagle3" in lost["speculative_method"]
    assert {"speculative_model", "num_speculative_tokens"} < set(lost)
