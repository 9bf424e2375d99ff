from typing import Any

import pytest
from pydantic import ValidationError

from autotune.deploy.serving_engine import ServingEngine, load_serving_engine, serving_engines
from autotune.deploy.translate import translate
from autotune.errors import BadInput
from engine.config import KNOBS, EngineConfig

# Long flags read in vLLM's own argument parser.
VLLM_FLAGS = {
    "model", "tokenizer", "dtype", "seed", "max-model-len", "quantization", "block-size",
    "gpu-memory-utilization", "kv-cache-memory-bytes", "enable-prefix-caching",
    "no-enable-prefix-caching", "max-num-seqs", "max-num-batched-tokens",
    "enable-chunked-prefill", "no-enable-chunked-prefill", "long-prefill-token-threshold",
    "scheduling-policy", "max-num-queued-reqs", "watermark", "kv-cache-dtype",
    "tensor-parallel-size", "enforce-eager",
}  # fmt: skip


def table(**knobs: Any) -> dict[str, Any]:
    return {
        "engine": "other",
        "title": "Other",
        "version": "1.0",
        "checked": ["1.0"],
        "file": "other.yaml",
        "command": "other other.yaml",
        "knobs": knobs,
    }


@pytest.mark.parametrize("name", serving_engines())
def test_table_knows_every_knob(name: str) -> None:
    assert set(load_serving_engine(name).knobs) == set(KNOBS)


def test_vllm_is_there_and_its_keys_are_vllms() -> None:
    mappings = load_serving_engine("vllm").knobs.values()
    keys = {key for m in mappings for key in (m.key, m.negated_key) if key is not None}
    assert keys == VLLM_FLAGS


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
        table(block_size={"key": "x", "plus": "no_such_knob"}),
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
