"""The technique table: whole, checked, and each problem of the list yields its solutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from autotune.advise.candidates import candidates, symptoms
from autotune.advise.facts import Facts
from autotune.advise.table import Table, load_table
from autotune.diagnose.finding import METRICS, Bottleneck
from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.profiling.schema import Communication, KvCache, Source
from tests.autotune.advise import situations

_TABLE = load_table()
_FILE = Path(__file__).parents[3] / "search_spaces" / "techniques.yaml"
# The techniques that the table has to have, by what the field calls them.
_NAMED = [
    "fp8_weights",
    "awq_int4",
    "gptq_int4",
    "int8_cpu",
    "int8_gpu",
    "gguf_cpu",
    "smoothquant",
    "llm_int8",
    "nf4",
    "kv_int8",
    "kv_fp8",
    "kv_eviction",
    "pruning_2_4",
    "distillation",
    "gqa_model",
    "smaller_model",
    "model_routing",
    "flash_attention",
    "paged_attention",
    "fused_kernels",
    "cuda_graphs",
    "larger_blocks",
    "smaller_blocks",
    "ngram_speculation",
    "draft_model",
    "medusa_heads",
    "adaptive_drafts",
    "fewer_drafts",
    "no_drafts",
    "continuous_batching",
    "dynamic_batching",
    "chunked_prefill",
    "smaller_token_budget",
    "larger_token_budget",
    "more_seats",
    "fewer_seats",
    "priority_scheduling",
    "shortest_job_first",
    "admission_control",
    "prefix_caching",
    "response_caching",
    "prompt_shortening",
    "max_tokens_limit",
    "streaming",
    "tensor_parallel",
    "pipeline_parallel",
    "sequence_parallel",
    "replicas",
    "disaggregation",
    "offload",
    "hopper_gpu",
    "cloud_gpu",
]

_OFF = {
    "enable_prefix_caching": False,
    "cuda_graphs": False,
    "max_num_seqs": 32,
}
_WITHOUT_CHUNKS = {
    **_OFF,
    "enable_chunked_prefill": False,
    "max_model_len": 2048,
    "batching_mode": "static",
}
_TOO_LARGE = {"resident_bytes": 150 * situations.GIB}


def everywhere() -> list[Facts]:
    """Situations on every kind of hardware; each technique fits at least one of them."""
    found = []
    for hardware in (
        situations.AMX,
        situations.AVX2,
        situations.TURING,
        situations.AMPERE,
        situations.NO_TRITON,
        situations.ADA,
        situations.HOPPER,
        situations.BLACKWELL,
        situations.gpu("9.0", count=2),
    ):
        for knobs in (
            _OFF,
            _WITHOUT_CHUNKS,
            {"block_size": 128},
            {"num_threads": 2},
            {"speculative_method": "ngram", "speculative_adaptive": False},
        ):
            for model in ({}, _TOO_LARGE, {"has_windows": True}):
                found.append(
                    situations.profile(hardware, knobs=knobs, model=situations.model(**model))
                )
        found.append(
            situations.profile(
                hardware,
                knobs={"tensor_parallel_size": 2},
                communication=Communication(ranks=2, share=0.4, imbalance=0.6),
            )
        )
    found.append(situations.profile(situations.HOPPER, source=Source(kind="metrics")))
    every = situations.diagnosis(
        *(situations.finding(m, b) for m in METRICS for b in get_args(Bottleneck))
    )
    return [situations.facts(p, every, slo) for p in found for slo in ("ttft<1s", "e2e<1s")]


def test_it_holds_the_techniques_of_the_field() -> None:
    names = {row.id for row in _TABLE.techniques}
    assert set(_NAMED) <= names
    assert len(names) >= 60


def test_every_bottleneck_has_a_first_answer_or_one_to_add() -> None:
    answered = {b for row in _TABLE.techniques for b in (*row.primary_for, *row.secondary_for)}
    assert answered == set(get_args(Bottleneck))


def test_every_technique_is_offered_somewhere() -> None:
    offered: set[str] = set()
    for facts in everywhere():
        offered |= {c.row.id for c in candidates(facts, _TABLE)[0]}
    assert {row.id for row in _TABLE.techniques} == offered


@pytest.mark.parametrize("name", _TABLE.symptoms)
def test_each_symptom_yields_its_primary_and_secondary_solutions(name: str) -> None:
    symptom = _TABLE.symptoms[name]
    found = situations.diagnosis(
        *(situations.finding(m, b) for m in symptom.metrics for b in symptom.bottlenecks)
    )
    assert name in symptoms(found, _TABLE)
    yielded: dict[str, set[str]] = {}
    for facts in everywhere():
        asked = situations.facts(facts.profile, found)
        for candidate in candidates(asked, _TABLE)[0]:
            yielded.setdefault(candidate.row.id, set()).add(candidate.role)
    for technique in symptom.primary:
        assert "primary" in yielded.get(technique, set()), technique
    assert set(symptom.secondary) <= set(yielded)


def test_a_weak_finding_makes_no_symptom() -> None:
    weak = situations.diagnosis(situations.finding("ttft", "prefill_compute", 0.1))
    assert symptoms(weak, _TABLE) == []


_MODEL_ROWS = {row.id for row in _TABLE.techniques if row.category == "model"}


@pytest.mark.parametrize(
    ("hardware", "quantizations"),
    [
        (situations.AMX, {"int8_cpu", "int4_cpu", "gguf_cpu", "smoothquant", "llm_int8"}),
        (situations.AVX2, {"gguf_cpu"}),
        (situations.TURING, {"int8_gpu"}),
        (situations.AMPERE, {"int8_gpu", "awq_int4", "int4_rtn", "smoothquant", "llm_int8"}),
        (situations.ADA, {"fp8_weights", "awq_int4", "int4_rtn", "smoothquant", "llm_int8"}),
        (situations.HOPPER, {"fp8_weights", "awq_int4", "int4_rtn", "smoothquant", "llm_int8"}),
        (
            situations.BLACKWELL,
            {"fp8_weights", "nvfp4_weights", "awq_int4", "int4_rtn", "smoothquant", "llm_int8"},
        ),
    ],
    ids=["AMX", "AVX2", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"],
)
def test_quantizations_are_those_of_the_hardware(hardware: Any, quantizations: set[str]) -> None:
    found = situations.diagnosis(situations.finding("tpot", "decode_weights"))
    facts = situations.facts(situations.profile(hardware), found)
    offered = {c.row.id for c in candidates(facts, _TABLE)[0]}
    weights = {
        row.id
        for row in _TABLE.techniques
        if "resident_weights" in row.effects and row.effort in ("reload", "prepare")
    } - {"tensor_parallel", "gptq_int4", "nf4"}
    assert offered & weights == quantizations
    assert ("gptq_int4" in offered) == ("nf4" in offered) == (hardware not in _NO_INT4)


_NO_INT4 = (situations.AVX2, situations.TURING)


def test_quantized_weights_are_not_quantized_again() -> None:
    found = situations.diagnosis(situations.finding("tpot", "decode_weights"))
    for hardware in (situations.AMX, situations.HOPPER):
        served = situations.profile(hardware, model=situations.model(weight_bits=8))
        offered = {c.row.id for c in candidates(situations.facts(served, found), _TABLE)[0]}
        assert not offered & {"fp8_weights", "awq_int4", "int8_cpu", "int4_cpu", "gguf_cpu"}


def test_speculation_is_not_offered_where_the_load_leaves_no_room() -> None:
    found = situations.diagnosis(situations.finding("tpot", "decode_weights"))
    for batch, offered in ((8.0, True), (80.0, False)):
        served = situations.profile(
            situations.HOPPER, phases=[situations.phase("decode", mean_batch=batch)]
        )
        rows = {c.row.id for c in candidates(situations.facts(served, found), _TABLE)[0]}
        assert ("ngram_speculation" in rows) is offered
        assert ("draft_model" in rows) is offered
        assert ("medusa_heads" in rows) is offered


def test_a_small_model_is_drafted_for_where_what_drafts_is_at_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 4}')
    found = situations.diagnosis(situations.finding("tpot", "decode_weights"))

    def offered(model: str, speculative_model: str | None = None) -> set[str]:
        served = situations.profile(
            knobs={"model": model, "speculative_model": speculative_model},
            model=situations.model(parameters=11_000_000),
        )
        rows = {c.row.id for c in candidates(situations.facts(served, found), _TABLE)[0]}
        return rows & {"draft_model", "medusa_heads"}

    assert offered("m") == set()
    assert offered(str(TARGET)) == {"draft_model"}
    assert offered("m", str(tmp_path)) == {"medusa_heads"}
    # A draft of the model's own size drafts at its own price.
    assert offered("m", str(TARGET)) == set()


def test_prefix_caching_is_offered_only_where_prefixes_repeat_and_it_is_off() -> None:
    found = situations.diagnosis(situations.finding("ttft", "poor_prefix_reuse"))
    for knobs, attainable, offered in (
        ({"enable_prefix_caching": False}, 0.4, True),
        ({"enable_prefix_caching": False}, 0.0, False),
        ({}, 0.4, False),
    ):
        kv = KvCache(hit_rate=0.0, attainable_hit_rate=attainable)
        served = situations.profile(knobs=knobs, kv=kv)
        rows = {c.row.id for c in candidates(situations.facts(served, found), _TABLE)[0]}
        assert ("prefix_caching" in rows) is offered


def test_what_cannot_be_judged_is_named_with_what_is_lacking() -> None:
    found = situations.diagnosis(situations.finding("tpot", "decode_weights"))
    served = situations.profile(
        None, engine_config=None, source=Source(kind="metrics", server="vllm")
    )
    called, unjudged = candidates(situations.facts(served, found), _TABLE)
    assert "device" in unjudged["fp8_weights"]
    assert "fp8_weights" not in {c.row.id for c in called}


Change = Callable[[dict[str, Any]], Any]


def _row(raw: dict[str, Any], name: str = "fp8_weights") -> dict[str, Any]:
    row: dict[str, Any] = next(r for r in raw["techniques"] if r["id"] == name)
    return row


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: _row(raw).update(knobs={"quantisation": "fp8"}), "quantisation is no knob"),
        (lambda raw: _row(raw).update(knobs={"quantization": "fp9"}), "fp9"),
        (lambda raw: _row(raw).update(knobs={"max_num_seqs": 1.5}), "must be of type int"),
        (lambda raw: _row(raw).update(effects={"wieghts": 1}), "wieghts"),
        (lambda raw: _row(raw).update(effects={"device": [2, 1, 3]}), "low, value, high"),
        (lambda raw: _row(raw).update(effects={"device": {"formula": "magic"}}), "no formula"),
        (
            lambda raw: _row(raw).update(
                effects={"weight_reads": {"formula": "weight_bits_ratio", "arguments": {"b": 1}}}
            ),
            "takes bits",
        ),
        (lambda raw: _row(raw).update(primary_for=["slowness"]), "fp8_weights"),
        (lambda raw: _row(raw).update(primary_for=[], secondary_for=[]), "answers no bottleneck"),
        (lambda raw: _row(raw).update(why="{kv.hitrate}"), "no fact"),
        (lambda raw: _row(raw).update(when={"fact": "kv.hitrate", "above": 1}), "no fact"),
        (lambda raw: _row(raw).pop("trade_off"), "Field required"),
        (lambda raw: _row(raw).update(knobs={}), "out of reach"),
        (lambda raw: _row(raw).update(extra=1), "not permitted"),
        (lambda raw: _row(raw).update(alternative_to=["fp9"]), "names no technique"),
        (lambda raw: raw["techniques"].append(_row(raw)), "the same id"),
        (lambda raw: raw["symptoms"]["slow_rag"]["primary"].append("magic"), "no technique"),
        (
            lambda raw: raw["symptoms"]["slow_rag"]["primary"].append("cuda_graphs"),
            "answers none of its bottlenecks",
        ),
    ],
)
def test_a_wrong_table_is_refused(change: Change, complaint: str, tmp_path: Path) -> None:
    raw = copy.deepcopy(yaml.safe_load(_FILE.read_text(encoding="utf-8")))
    change(raw)
    path = tmp_path / "techniques.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(BadInput, match=complaint) as refusal:
        load_table(path)
    assert str(path) in str(refusal.value)


def test_a_table_that_is_not_there_or_no_yaml_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        load_table(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("techniques: [", encoding="utf-8")
    with pytest.raises(BadInput, match="cannot be read"):
        load_table(broken)


def test_the_shipped_table_is_the_file() -> None:
    assert load_table(_FILE) == _TABLE
    assert isinstance(_TABLE, Table)
    with pytest.raises(StopIteration):
        _TABLE.technique("magic")
