"""Advice: what is called for, judged, ranked and told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from autotune.advise.advice import Advice, AdviceList
from autotune.advise.advise import advise, binding_metric
from autotune.advise.candidates import fill
from autotune.embedded import DRAFT, TARGET
from autotune.predict.change import Change
from autotune.profiling.schema import AttentionProbe, LinearProbe, Probes, Profile, Source
from autotune.search.methods_offered import Offer
from autotune.slo import parse_slo
from tests.autotune.advise import situations
from tests.autotune.advise.situations import Told, diagnosis, finding, profile

_PROBES = Probes(
    linears=[
        LinearProbe(method=m, rows=[1], layers_s=[0.1], head_s=[0.1]) for m in ("none", "int8")
    ],
    attention=[
        AttentionProbe(kv_cache_dtype=c, sequences=[1], contexts=[1], seconds=[0.1])
        for c in ("auto", "int8")
    ],
)


def advised(
    of: Profile,
    *bottlenecks: tuple[str, str],
    told: Told | None = None,
    slo: str = "ttft<2s,tpot<50ms",
    binding: str | None = "tpot",
    **others: Any,
) -> AdviceList:
    found = diagnosis(*(finding(m, b) for m, b in bottlenecks), binding=binding)
    return advise(of, found, told or Told(), slo=parse_slo(slo), **others)


def by_name(advice: AdviceList) -> Mapping[str, Advice]:
    return {item.technique: item for item in advice.advice}


def test_only_what_a_finding_calls_for_is_advised() -> None:
    assert advised(profile()).advice == ()
    found = by_name(advised(profile(), ("tpot", "decode_weights")))
    assert "int8_cpu" in found
    assert found["int8_cpu"].problems == ("decode_weights",)
    assert "watermark" not in found
    weak = diagnosis(finding("tpot", "decode_weights", severity=0.01))
    assert advise(profile(), weak, Told(), slo=None).advice == ()


def test_nothing_for_another_device_is_advised() -> None:
    every = [("tpot", b) for b in ("decode_weights", "decode_kv", "host_bound", "kv_capacity")]
    on_cpu = set(by_name(advised(profile(), *every)))
    assert not on_cpu & {"fp8_weights", "awq_int4", "kv_fp8", "cuda_graphs", "tensor_parallel"}
    on_gpu = set(by_name(advised(profile(situations.HOPPER), *every)))
    assert not on_gpu & {"int8_cpu", "int4_cpu", "gguf_cpu", "cloud_gpu", "hopper_gpu"}
    assert {"fp8_weights", "tensor_parallel"} <= on_gpu


def test_the_ranking_is_by_the_binding_metric() -> None:
    def gain(change: Change) -> Mapping[str, float]:
        if change.knobs.get("quantization") == "int8":
            return {"tpot": 1.2, "ttft": 1.8}
        return {"tpot": 1.6, "ttft": 1.1} if "kv_cache_dtype" in change.knobs else {"tpot": 1.0}

    problems = [("tpot", "decode_weights"), ("tpot", "decode_kv"), ("ttft", "prefill_compute")]
    measured = profile(probes=_PROBES)
    by_tpot = advised(measured, *problems, told=Told(gain))
    assert [a.technique for a in by_tpot.advice][:2] == ["kv_int8", "int8_cpu"]
    by_ttft = advised(measured, *problems, told=Told(gain), binding="ttft")
    assert by_ttft.advice[0].technique == "int8_cpu"
    assert by_ttft.advice[0].gain is not None
    assert by_ttft.advice[0].gain.metric == "ttft"


def test_what_makes_nothing_better_is_left_out_with_a_note() -> None:
    advice = advised(profile(), ("tpot", "decode_weights"), told=Told(lambda _: 0.8))
    assert advice.advice == ()
    assert advice.first is None
    assert any("left out" in note and "0.80x" in note for note in advice.notes)


def test_what_helps_another_metric_that_it_answers_is_kept_behind() -> None:
    def gain(change: Change) -> Mapping[str, float]:
        policy = change.knobs.get("scheduling_policy")
        return {"tpot": 1.0, "ttft": 3.0} if policy else {"tpot": 1.2, "ttft": 1.0}

    advice = advised(
        profile(), ("tpot", "decode_weights"), ("ttft", "queue_bursts"), told=Told(gain)
    )
    names = [a.technique for a in advice.advice]
    assert "shortest_job_first" in names
    assert names.index("shortest_job_first") > names.index("int8_cpu")


def test_the_best_predicted_value_of_a_knob_is_taken_and_all_are_opened() -> None:
    def gain(change: Change) -> float:
        return {1024: 1.2, 512: 1.6, 256: 1.4}.get(change.knobs.get("max_num_batched_tokens", 0), 1)

    advice = advised(profile(), ("tpot", "prefill_interference"), told=Told(gain))
    item = by_name(advice)["smaller_token_budget"]
    assert item.knobs == {"max_num_batched_tokens": 512}
    assert set(item.opens["max_num_batched_tokens"]) == {2048, 1024, 512, 256}
    assert item.testable


def test_advice_that_would_break_a_limit_that_is_met_comes_later_and_says_so() -> None:
    def gain(change: Change) -> Mapping[str, float]:
        budget = "max_num_batched_tokens" in change.knobs
        return {"tpot": 2.0, "ttft": 0.6} if budget else {"tpot": 1.3, "ttft": 1.0}

    problems = [("tpot", "prefill_interference"), ("tpot", "decode_weights")]
    advice = advised(profile(), *problems, told=Told(gain), slo="ttft<1.2s,tpot<50ms")
    names = [a.technique for a in advice.advice]
    assert names.index("smaller_token_budget") > names.index("int8_cpu")
    assert "break ttft<1.2s" in by_name(advice)["smaller_token_budget"].why
    assert by_name(advice)["smaller_token_budget"].breaks == "ttft<1.2s"
    assert advice.first != "smaller_token_budget"
    # TTFT is 1 s: with a limit of 2 s it stays met at 1.7 s.
    loose = by_name(advised(profile(), *problems, told=Told(gain)))["smaller_token_budget"]
    assert "break" not in loose.why
    assert loose.breaks is None


@pytest.mark.parametrize(
    ("slo", "offered"),
    [
        ("tpot<50ms", False),  # nobody asked for TTFT: it is kept from ruin all the same
        ("ttft<2s,tpot<50ms", False),
        ("ttft<100ms,tpot<50ms", False),  # missed already, and far worse then
        ("ttft<200s,tpot<50ms", True),  # 100 s are within what is asked for
    ],
)
def test_what_ruins_another_metric_is_no_gain_unless_a_limit_allows_it(
    slo: str, offered: bool
) -> None:
    def gain(change: Change) -> Mapping[str, float]:
        seats = "max_num_seqs" in change.knobs
        return {"tpot": 2.5, "ttft": 0.01} if seats else {"tpot": 1.0}

    advice = advised(profile(), ("tpot", "decode_compute"), told=Told(gain), slo=slo)
    assert ("fewer_seats" in by_name(advice)) is offered
    told = [n for n in advice.notes if "Fewer sequences a step, max_num_seqs=16 (ttft 0.01x)" in n]
    assert bool(told) is not offered


def test_of_several_values_one_that_ruins_nothing_is_taken_and_the_others_are_not_opened() -> None:
    def gain(change: Change) -> Mapping[str, float]:
        seats = change.knobs.get("max_num_seqs")
        return {"tpot": {16: 2.5, 24: 1.4}.get(seats, 1.0), "e2e": 0.2 if seats == 16 else 1.0}

    item = by_name(advised(profile(), ("tpot", "decode_compute"), told=Told(gain)))["fewer_seats"]
    assert item.knobs == {"max_num_seqs": 24}
    assert 16 not in item.opens["max_num_seqs"]


def test_a_value_that_breaks_a_limit_gives_way_to_one_that_does_not() -> None:
    def gain(change: Change) -> Mapping[str, float]:
        seats = change.knobs.get("max_num_seqs")
        return {"tpot": {16: 2.5, 24: 1.4}.get(seats, 1.0), "ttft": 0.7 if seats == 16 else 1.0}

    item = by_name(
        advised(profile(), ("tpot", "decode_compute"), told=Told(gain), slo="ttft<1.2s,tpot<50ms")
    )["fewer_seats"]
    assert item.knobs == {"max_num_seqs": 24}
    assert item.breaks is None


def test_a_knob_that_has_no_better_value_is_no_advice() -> None:
    queueing = profile().queueing.model_copy(update={"utilisation": 0.5, "running_mean": 30.0})
    busy = profile(queueing=queueing)
    advice = advised(busy, ("tpot", "decode_compute"), told=Told(lambda _: 1.5))
    assert "fewer_seats" not in by_name(advice)
    assert any("no better value" in n and "Fewer sequences a step" in n for n in advice.notes)


def test_a_command_tries_the_change_beside_what_was_profiled() -> None:
    few = profile(knobs={"max_num_seqs": 32, "enable_prefix_caching": False})
    seats = by_name(advised(few, ("ttft", "low_batch")))["more_seats"]
    bench, run = seats.commands
    assert "--no-enable-prefix-caching" in bench
    assert bench.endswith("--max-num-seqs 64")
    assert "--max-num-seqs 32" not in bench
    assert "--no-enable-prefix-caching" in run
    assert "--search max_num_seqs=32,64" in run
    # The engine chose the cache's size: there is no present value to search beside.
    cache = by_name(advised(profile(), ("memory", "kv_capacity")))["larger_cache"]
    assert len(cache.commands) == 1
    assert cache.commands[0].startswith("autotune bench")


def test_more_gpus_than_are_here_have_to_be_bought() -> None:
    one = by_name(advised(profile(situations.HOPPER), ("tpot", "decode_weights")))
    assert one["tensor_parallel"].effort == "buy"
    two = by_name(advised(profile(situations.gpu("9.0", count=2)), ("tpot", "decode_weights")))
    assert two["tensor_parallel"].effort == "reload"


def test_at_low_load_what_saves_money_stands_behind_what_the_limit_needs() -> None:
    quiet = profile(
        queueing=profile().queueing.model_copy(update={"utilisation": 0.1, "busy_share": 0.1})
    )
    advice = advised(
        quiet,
        ("cost", "low_load"),
        ("ttft", "prefill_compute"),
        binding="ttft",
        told=Told(lambda c: {"ttft": 1.2 if c.knobs else 9.0}),
    )
    names = [a.technique for a in advice.advice]
    assert names[-1] == "smaller_machine"
    assert by_name(advice)[str(advice.first)].testable


def test_knobs_are_judged_by_probes_and_the_rest_by_published_factors() -> None:
    told = Told()
    found = by_name(advised(profile(probes=_PROBES), ("tpot", "decode_weights"), told=told))
    asked = {change.knobs.get("quantization"): change for change in told.asked}
    assert not asked["int8"].factors
    assert asked["int4"].factors  # no probe measured it
    assert found["int8_cpu"].gain is not None
    assert found["int8_cpu"].gain.basis == "replay"
    assert found["int4_cpu"].gain is not None
    assert found["int4_cpu"].gain.basis == "estimate"
    assert found["int4_cpu"].confidence == "low"


def test_a_prediction_that_knows_not_the_knob_is_asked_of_the_effects_alone() -> None:
    told = Told(lambda change: None if change.knobs else 1.4)
    item = by_name(advised(profile(), ("tpot", "decode_weights"), told=told))["int8_cpu"]
    assert item.gain is not None
    assert item.gain.value == 1.4
    assert item.gain.basis == "estimate"
    assert item.knobs == {"quantization": "int8"}


def test_without_a_predictor_advice_has_no_gain_but_stands() -> None:
    found = diagnosis(finding("tpot", "decode_weights"))
    advice = advise(profile(), found, None, slo=None)
    named = by_name(advice)
    assert named["int8_cpu"].gain is None
    assert named["int8_cpu"].confidence == "low"


@pytest.mark.parametrize(
    ("technique", "bottleneck", "hardware", "reason"),
    [
        ("distillation", "decode_weights", situations.AMX, "trained"),
        ("response_caching", "decode_weights", situations.AMX, "in front"),
        ("disaggregation", "prefill_interference", situations.HOPPER, "two engines"),
        ("ngram_speculation", "decode_weights", situations.HOPPER, None),
        ("tensor_parallel", "decode_weights", situations.HOPPER, "it takes 2 GPUs"),
        ("hopper_gpu", "decode_weights", situations.AMPERE, "other hardware"),
    ],
)
def test_what_cannot_be_tested_here_says_why(
    technique: str, bottleneck: str, hardware: Any, reason: str | None
) -> None:
    from engine.config import KNOBS

    item = by_name(advised(profile(hardware), ("tpot", bottleneck)))[technique]
    if reason is None:  # derived: testable as soon as the engine has the knob
        assert item.testable == ("speculative_method" in KNOBS)
        return
    assert not item.testable
    assert item.why_not is not None
    assert reason in item.why_not
    assert item.commands == ()
    assert item.opens == {}


def test_two_gpus_make_tensor_parallelism_testable() -> None:
    served = profile(situations.gpu("9.0", count=2))
    assert by_name(advised(served, ("tpot", "decode_weights")))["tensor_parallel"].testable


def test_what_the_search_does_not_offer_is_not_testable() -> None:
    offer = Offer({"quantization": ("none", "int4"), "kv_cache_dtype": ("auto",)})
    found = by_name(
        advised(profile(), ("tpot", "decode_weights"), ("tpot", "decode_kv"), offer=offer)
    )
    assert found["int4_cpu"].testable
    assert not found["int8_cpu"].testable
    assert not found["kv_int8"].testable


def test_another_servers_profile_has_nothing_to_test_and_names_what_it_lacks() -> None:
    server = Source(kind="metrics", where="http://localhost:8000", server="vllm")
    served = profile(None, engine_config=None, source=server)
    advice = advised(served, ("tpot", "decode_weights"), ("ttft", "poor_prefix_reuse"))
    assert advice.advice
    assert not any(item.testable for item in advice.advice)
    assert any("Not judged" in note and "the hardware" in note for note in advice.notes)


def test_memory_of_an_unmeasured_model_is_judged_by_its_weights() -> None:
    large = situations.model(matmul_parameters=100 * 10**9, resident_bytes=200 * situations.GIB)
    served = profile(situations.HOPPER, model=large, metrics=None)
    found = diagnosis(finding("memory", "model_does_not_fit", 1.0), binding=None)
    advice = advise(served, found, Told(lambda _: None), slo=None)
    named = by_name(advice)
    assert {"fp8_weights", "awq_int4", "tensor_parallel", "offload"} <= set(named)
    gains = {n: named[n].gain for n in ("fp8_weights", "awq_int4")}
    assert gains["awq_int4"] is not None
    assert gains["fp8_weights"] is not None
    assert gains["awq_int4"].metric == "memory"
    assert gains["awq_int4"].value > gains["fp8_weights"].value > 1
    assert advice.symptoms == ("model_does_not_fit",)


def test_the_binding_metric_is_that_of_the_worst_finding_where_nothing_binds() -> None:
    found = diagnosis(
        finding("ttft", "queue_bursts", 0.2), finding("memory", "kv_capacity", 0.6), binding=None
    )
    assert binding_metric(found) == "memory"
    assert binding_metric(diagnosis(binding=None)) == "throughput"


def test_what_to_do_first_is_what_a_trial_shows() -> None:
    def gain(change: Change) -> float:
        return 1.3 if change.knobs.get("quantization") == "int8" else 4.0 if not change.knobs else 1

    advice = advised(profile(probes=_PROBES), ("tpot", "decode_weights"), told=Told(gain))
    assert advice.first == "int8_cpu"
    nothing = advised(
        profile(), ("tpot", "decode_weights"), told=Told(lambda c: 1.0 if c.knobs else 2.0)
    )
    assert nothing.first is not None
    assert not by_name(nothing)[nothing.first].testable


def test_alternatives_stand_behind_what_they_stand_in_for() -> None:
    names = [a.technique for a in advised(profile(), ("tpot", "decode_weights")).advice]
    assert names.index("smoothquant") > names.index("int8_cpu")
    assert names.index("gptq_int4") > names.index("int4_cpu")


def test_advice_is_the_same_each_time_and_plain_json() -> None:
    problems = [(m, b) for m in ("ttft", "tpot") for b in ("decode_weights", "queue_saturation")]
    one, two = (advised(profile(), *problems).to_json() for _ in range(2))
    assert json.dumps(one) == json.dumps(two)
    for item in one["advice"]:
        assert {"technique", "problem", "knobs", "gain", "trade_off", "effort", "testable"} <= set(
            item
        )
        assert item["gain"] is None or {"value", "low", "high"} <= set(item["gain"])
        assert "{" not in item["why"] + item["trade_off"]


def test_sentences_name_the_numbers_behind_them() -> None:
    facts = situations.facts(profile())
    assert fill("{decode_batch:.1f} sequences", facts) == "8.0 sequences"
    assert fill("{kv.recomputed_share:.0%} again", facts) is None
    item = by_name(advised(profile(), ("tpot", "decode_weights")))["int4_cpu"]
    assert item.why.startswith("It is decode_weights.")
    assert "8.0 sequences" in item.why


def test_limits_that_cannot_be_met_are_listed_with_the_advice() -> None:
    # 16 GB of weights over 100 GB/s: no token comes in 1 ms.
    advice = advised(profile(), ("tpot", "decode_weights"), slo="tpot<1ms")
    assert [item.limit for item in advice.infeasible] == ["tpot<1ms"]
    assert advice.infeasible[0].bound is not None
    assert advice.infeasible[0].bound > 0.001


class _Refusing(Told):
    """A bounded queue leaves more requests within the SLO."""

    def metrics(
        self, change: Change = situations.NO_CHANGE, rate_factor: float | None = 1.0
    ) -> dict[str, Any]:
        return {"slo_attainment": (0.6 if change.knobs else 0.2) / (rate_factor or 1.0)}


def test_refusing_requests_is_judged_by_goodput_and_not_by_who_was_let_in() -> None:
    advice = advised(
        profile(), ("ttft", "queue_saturation"), told=_Refusing(lambda _: 9.0), binding="ttft"
    )
    item = by_name(advice)["admission_control"]
    assert item.gain is None
    assert [g.metric for g in item.gains] == ["goodput"]
    assert item.gains[0].value == pytest.approx(3.0)
    assert advice.first != "admission_control"
    useless = advised(profile(), ("ttft", "queue_saturation"), binding="ttft")
    assert "goodput" not in {g.metric for a in useless.advice for g in a.gains}


def drafting(model: str, speculative_model: str | None = None) -> Mapping[str, Advice]:
    served = profile(knobs={"model": model, "speculative_model": speculative_model})
    return by_name(advised(served, ("tpot", "decode_weights")))


def test_a_draft_model_that_is_at_hand_can_be_tested_and_any_other_takes_one() -> None:
    at_hand = drafting(str(TARGET))["draft_model"]
    assert at_hand.testable
    assert at_hand.effort == "reload"
    # What is known for the model is not for the user to name.
    assert at_hand.knobs == {"speculative_method": "draft_model", "num_speculative_tokens": 4}
    bench, search = at_hand.commands
    assert "--speculative-method draft_model --num-speculative-tokens 4" in bench
    assert "--search speculative_method=none,draft_model" in search
    unknown = drafting("m")["draft_model"]
    assert not unknown.testable
    assert unknown.effort == "deploy"
    assert "--speculative-model names no folder of a smaller model" in str(unknown.why_not)
    assert not unknown.commands
    named = drafting("m", "small")["draft_model"]
    assert named.testable
    assert "--speculative-model small" in named.commands[0]


def test_what_drafts_by_itself_is_judged_with_the_model_that_it_would_have() -> None:
    told = Told()
    served = profile(knobs={"model": str(TARGET)})
    advised(served, ("tpot", "decode_weights"), told=told)
    drafted = [c.knobs for c in told.asked if c.knobs.get("speculative_method") == "draft_model"]
    assert drafted
    assert all(knobs["speculative_model"] == str(DRAFT) for knobs in drafted)


def test_lookup_keeps_the_number_of_drafts_that_nothing_heeded_so_far() -> None:
    """4 tokens are the default's, which drafts none of them: they are worth judging."""
    told = Told(lambda c: 2.0 if c.knobs.get("num_speculative_tokens") == 4 else 1.5)
    found = by_name(advised(profile(), ("tpot", "decode_weights"), told=told))
    lookup = found["ngram_speculation"]
    assert lookup.knobs == {"speculative_method": "ngram", "num_speculative_tokens": 4}
    assert set(lookup.opens["speculative_method"]) == {"none", "ngram", "suffix"}


def test_drafts_in_a_fixed_number_are_advised_to_adapt() -> None:
    knobs = {"speculative_method": "ngram", "speculative_adaptive": False}
    found = by_name(advised(profile(knobs=knobs), ("tpot", "decode_compute")))
    assert found["adaptive_drafts"].knobs == {"speculative_adaptive": True}
    assert found["adaptive_drafts"].testable
    assert "adaptive_drafts" not in by_name(advised(profile(), ("tpot", "decode_compute")))
