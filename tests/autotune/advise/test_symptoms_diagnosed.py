"""Each problem as people put it is seen by the diagnosis itself, and answered."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.advise.advise import advise
from autotune.diagnose.diagnose import diagnose
from autotune.profiling.schema import Breakdown, KvCache, Profile, Queueing, Traffic
from autotune.slo import parse_slo
from tests.autotune.advise import situations

_SLO = "ttft<200ms,tpot<100ms"
_ROOMY = KvCache(occupancy_peak=0.3, hit_rate=0.4, attainable_hit_rate=0.4)
_WASTED = KvCache(occupancy_peak=0.3, hit_rate=0.0, attainable_hit_rate=0.6)
_COMPUTE = [
    situations.phase("prefill", bound="compute", intensity=500.0),
    situations.phase("decode"),
]


def traffic(inputs: float, outputs: float) -> Traffic:
    return situations.profile().traffic.model_copy(
        update={
            "input_tokens": situations.spread(inputs, 2.2),
            "output_tokens": situations.spread(outputs, 2.2),
            "prompt_output_ratio": inputs / outputs,
            "arrival_cv": 1.0,
            "dispersion": 1.0,
            "top_output_share": 0.3,
        }
    )


def case(ttft: float = 0.1, tpot: float = 0.05, **changes: Any) -> Profile:
    """A calm server, but for the changes."""
    values: dict[str, Any] = {
        "slo": _SLO,
        "metrics": {
            "ttft": {"p95": ttft},
            "tpot": {"p95": tpot},
            "completed": 100,
            "output_tokens_per_s": 100.0,
        },
        "kv": _ROOMY,
        "queueing": Queueing(
            busy_share=0.6, utilisation=0.6, queue_max=2, running_max=4, running_mean=3.0
        ),
        "communication": None,
        "gpu": None,
        "traffic": traffic(200, 100),
    }
    return situations.profile(**{**values, **changes})


def spent(metric: Any, **parts: float) -> list[Breakdown]:
    return [Breakdown(metric=metric, seconds=1.0, parts=parts)]


@pytest.mark.parametrize(
    ("symptom", "served", "answers"),
    [
        (
            "high_ttft",
            case(0.5, breakdowns=spent("ttft", prefill_linear=0.8, queue=0.2), phases=_COMPUTE),
            {"int8_cpu", "prompt_shortening"},
        ),
        (
            "high_tpot",
            case(tpot=0.3, breakdowns=spent("tpot", weights=0.9, host=0.1)),
            {"int8_cpu", "int4_cpu"},
        ),
        (
            "model_does_not_fit",
            case(metrics=None, model=situations.model(resident_bytes=200 * situations.GIB)),
            {"int8_cpu", "int4_cpu", "smaller_model", "distillation", "gguf_cpu", "more_memory"},
        ),
        (
            "low_throughput_or_high_cost",
            case(breakdowns=spent("throughput", weights=0.7, kv_reads=0.2, idle=0.1)),
            {"int8_cpu", "kv_int8", "model_routing", "response_caching", "smaller_model"},
        ),
        (
            "slow_rag",
            case(
                0.5,
                breakdowns=spent("ttft", prefill_linear=0.7, prefill_attention=0.2, queue=0.1),
                phases=_COMPUTE,
                traffic=traffic(4000, 100),
                kv=_WASTED,
                knobs={"enable_prefix_caching": False},
            ),
            {"prefix_caching", "prompt_shortening", "chunk_kv_reuse", "response_caching"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_symptom_is_diagnosed_and_answered(
    symptom: str, served: Profile, answers: set[str]
) -> None:
    advice = advise(served, diagnose(served), None, slo=parse_slo(_SLO))
    assert symptom in advice.symptoms
    assert answers <= {item.technique for item in advice.advice}
