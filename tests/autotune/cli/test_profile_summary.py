"""A profile as it is printed: every part that is known, none that is not, and no crash."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from autotune.cli.profile_summary import print_profile
from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import Diagnosis, Finding
from autotune.profiling.schema import (
    Breakdown,
    Communication,
    Gpu,
    GpuSample,
    Profile,
    Source,
    Speculation,
    Traffic,
)
from tests.autotune.diagnose.profiles import altered, profile


def printed(found: Profile, diagnosis: Diagnosis | None = None, **console: Any) -> str:
    stream = io.StringIO()
    options = {"width": 100, "color_system": None} | console
    print_profile(found, diagnosis or diagnose(found), Console(file=stream, **options))
    return stream.getvalue()


def test_phases_stand_in_a_table_with_their_ceilings() -> None:
    text = printed(profile())
    row = re.search(r"^prefill +40% +200 +10 ms +20 ms +4 +300 +30% +60%", text, re.MULTILINE)
    assert row, text
    assert "100 GB/s for the weights" in text
    assert "10 TFLOP/s in bfloat16; ridge 100 operations/byte" in text


def test_breakdown_has_a_bar_for_each_part_longest_first() -> None:
    parts = {"weights": 0.6, "host": 0.3, "kv_reads": 0.099, "other": 0.001}
    text = printed(profile(breakdowns=[Breakdown(metric="tpot", seconds=0.02, parts=parts)]))
    lines = text[text.index("TPOT  mean 20 ms") :].splitlines()[1:4]
    assert [line.split("  ")[1] for line in lines] == [
        *("reading weights", "host", "reading keys and values"),
    ]
    bars = [line.count("█") for line in lines]
    assert bars[0] == 2 * bars[1] > bars[2] > 0
    assert "other device time" not in text, "a thousandth is not worth a line"


def test_cache_queue_and_host_are_told_in_their_units() -> None:
    text = printed(
        profile(
            kv=altered(profile().kv, hit_rate=0.1, attainable_hit_rate=0.62, preemptions=7),
            queueing=altered(profile().queueing, stable=False, growth_per_s=1.5, utilisation=1.2),
            communication=Communication(ranks=2, share=0.31),
        )
    )
    assert "10% of prompt tokens found in the prefix cache; this traffic allows 62%" in text
    assert "7 preemptions" in text
    assert "what arrives is 120% of what full batches sustain" in text
    assert "not stable: 1.5 more requests in the system every second" in text
    assert "2 ranks spend 31% of device time in collectives" in text
    assert "the device waits for it 4.0% of step time" in text


def test_gpu_and_drafts_are_told_where_they_were_looked_at() -> None:
    gpu = Gpu(
        samples=[GpuSample(at_s=0.0, index=0)],
        interval_s=0.1,
        power_mean_watts=512.0,
        power_limit_watts=700.0,
        clock_ratio=0.8,
        throttled_share=0.25,
        throttle_reasons={"sw_power_cap": 0.25},
    )
    drafts = Speculation(
        num_requests=30,
        min_ngram=2,
        max_ngram=4,
        tokens_per_step={1: 1.2, 4: 1.9, 8: 1.8},
        hit_share=0.5,
        synthetic_prompts=True,
    )
    text = printed(profile(gpu=gpu, speculation=drafts), width=200)
    assert "512 of 700 W" in text
    assert "slowed in 25% of the samples: sw power cap" in text
    assert "drafts of 4 would yield 1.9 tokens a step" in text
    assert "made up from lengths" in text
    without = printed(profile())
    assert "GPU" not in without
    assert "Speculation" not in without


def finding(metric: Any, bottleneck: Any, severity: float) -> Finding:
    return Finding(metric, bottleneck, severity, severity, {}, f"The {bottleneck} of {metric}.")


def test_findings_come_by_metric_with_small_ones_by_name_alone() -> None:
    diagnosis = Diagnosis(
        (
            finding("ttft", "queue_saturation", 0.9),
            finding("ttft", "host_bound", 0.1),
            finding("memory", "kv_capacity", 0.05),
        ),
        binding="ttft",
        binding_limit="ttft<200ms",
        binding_ratio=3.25,
        unjudged=("tpot: nobody knows",),
    )
    text = printed(profile(), diagnosis)
    told = text[text.index("Bottlenecks") :]
    assert "ttft<200ms binds: missed, at 3.25 times the limit" in told
    assert "high   queue_saturation, 90%. The queue_saturation of ttft." in told
    assert "also host_bound 10%" in told
    assert "The host_bound of ttft." not in told
    assert "low    kv_capacity, 5%. The kv_capacity of memory." in told, "a metric's first is told"
    assert told.index("TTFT") < told.index("Memory")
    assert "tpot: nobody knows" in told


def test_lack_is_said_once() -> None:
    diagnosis = Diagnosis((), unjudged=("ttft: unknown: too short", "memory: unknown"))
    text = printed(profile(partial=["too short"]), diagnosis)
    assert text.count("too short") == 1
    assert "memory: unknown" in text


def test_evidence_that_is_too_short_is_said_once_with_all_that_it_leaves_open() -> None:
    short = [
        "the burstiness of arrivals needs at least 20 requests; has 1",
        "the arithmetic of the decode phase needs at least 20 steps; has 9",
        "the breakdown of time to first token needs at least 20 requests; has 1",
    ]
    found = profile(
        partial=short, breakdowns=[], queueing=altered(profile().queueing, wait_share=None)
    )
    diagnosis = diagnose(found)
    about_ttft = "ttft: where the time to the first token goes needs at least 20 requests; has 1"
    assert about_ttft in diagnosis.unjudged
    text = printed(found, diagnosis, width=200)
    lacks = text[text.index("Not known") :]
    assert lacks.count("needs at least 20 requests; has 1") == 1
    assert (
        "needs at least 20 requests; has 1: the burstiness of arrivals, the breakdown of time to "
        "first token\n" in lacks
    )
    assert "the arithmetic of the decode phase needs at least 20 steps; has 9\n" in lacks
    assert "tpot: where the time between tokens goes is not known\n" in lacks


@pytest.mark.parametrize(("ratio", "state"), [(None, "missed"), (0.5, "met, at 0.5 times")])
def test_binding_limit_says_whether_it_is_met(ratio: float | None, state: str) -> None:
    diagnosis = Diagnosis((), binding_limit="ttft<1s", binding_ratio=ratio)
    text = printed(profile(), diagnosis)
    assert f"ttft<1s binds: {state}" in text
    assert "none found" in text


def test_profile_that_knows_next_to_nothing_is_printed_all_the_same() -> None:
    empty = Profile(
        created_at="2026-01-01T00:00:00+00:00",
        source=Source(kind="metrics", where="http://x/metrics", server="vllm"),
        traffic=Traffic.none(),
        partial=["no traffic in the window", "no traffic in the window"],
    )
    text = printed(empty, Diagnosis(()))
    assert text.startswith("vllm at http://x/metrics in 0 s\n")
    assert text.count("no traffic in the window") == 1


def test_lines_of_a_pipe_are_whole_and_without_escapes() -> None:
    sentence = "A long sentence. " * 20
    diagnosis = Diagnosis((Finding("ttft", "host_bound", 0.9, 0.9, {}, sentence),))
    lines = printed(profile(), diagnosis, width=80).splitlines()
    assert any(sentence.strip() in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_seconds_are_written_as_such() -> None:
    text = printed(profile(metrics={"ttft": {"p50": 12.345, "p95": 0.0123}}))
    assert "TTFT p50 12.3 s, p95 12.3 ms" in text
