"""Knobs that cannot matter are named with a reason, and no other."""

from __future__ import annotations

from typing import Any

from autotune.advise.relevance import irrelevant_knobs
from autotune.profiling.schema import Breakdown, KvCache, Profile, Queueing, Source, Spread
from tests.autotune.advise import situations

_IDLE: dict[str, Any] = {
    "kv": KvCache(occupancy_peak=0.2, preemptions=0, hit_rate=0.0, attainable_hit_rate=0.0),
    "queueing": Queueing(queue_max=1, running_max=3),
    "breakdowns": [Breakdown(metric="tpot", seconds=0.1, parts={"weights": 1.0})],
}
_SHORT = Spread(mean=40, p50=40, p95=50, p99=60, max=60)


def idle(hardware: Any = situations.AMX, **changes: Any) -> Profile:
    traffic = situations.profile().traffic.model_copy(update={"input_tokens": _SHORT})
    return situations.profile(hardware, **{**_IDLE, "traffic": traffic, **changes})


def test_an_idle_server_leaves_only_the_speed_of_a_step_to_tune() -> None:
    found = irrelevant_knobs(idle())
    assert set(found) == {
        "enable_prefix_caching",
        "long_prefill_token_threshold",
        "max_num_seqs",
        "max_num_batched_tokens",
        "scheduling_policy",
        "watermark",
        "kv_cache_dtype",
        "block_size",
    }
    assert "60 tokens" in found["long_prefill_token_threshold"]
    assert "20% full" in found["watermark"]
    on_gpu = irrelevant_knobs(idle(situations.HOPPER))
    assert {"gpu_memory_utilization", "cuda_graphs"} <= set(on_gpu)


def test_a_busy_server_needs_every_knob() -> None:
    assert irrelevant_knobs(situations.profile()) == {}


def test_at_other_loads_only_what_the_requests_are_says_something() -> None:
    found = irrelevant_knobs(idle(), load_fixed=False)
    assert set(found) == {"enable_prefix_caching", "long_prefill_token_threshold"}


def test_each_knob_counts_again_with_its_reason_gone() -> None:
    kv = _IDLE["kv"]
    for change, again in (
        ({"kv": kv.model_copy(update={"attainable_hit_rate": 0.3})}, "enable_prefix_caching"),
        ({"kv": kv.model_copy(update={"preemptions": 1})}, "watermark"),
        ({"kv": kv.model_copy(update={"occupancy_peak": 0.9})}, "kv_cache_dtype"),
        ({"queueing": Queueing(queue_max=9, running_max=3)}, "scheduling_policy"),
        ({"queueing": Queueing(queue_max=1, running_max=9)}, "max_num_seqs"),
        (
            {"breakdowns": [Breakdown(metric="tpot", seconds=0.1, parts={"kv_reads": 0.2})]},
            "block_size",
        ),
        ({"breakdowns": []}, "kv_cache_dtype"),
    ):
        assert again not in irrelevant_knobs(idle(**change)), again


def test_too_few_requests_or_another_server_prove_nothing() -> None:
    few = idle().traffic.model_copy(update={"completed": 19})
    assert irrelevant_knobs(idle(traffic=few)) == {}
    assert irrelevant_knobs(idle(source=Source(kind="metrics", server="sglang"))) == {}
