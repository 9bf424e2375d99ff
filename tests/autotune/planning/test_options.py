"""What is asked of a plan is checked before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.planning.options import PlanOptions, parse_share, split_names
from autotune.traffic_options import TrafficOptions


def asked(**changes: Any) -> PlanOptions:
    given: dict[str, Any] = {
        "model": "model",
        "traffic": TrafficOptions(source="chat", rate=5.0),
        "slo": "ttft<1s",
        "gpus": ("h100",),
    }
    return PlanOptions(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": ()}, "--gpus"),
        ({"tensor_parallel_sizes": (3,)}, "1, 2, 4, 8, 16"),
        ({"quantizations": ("int3",)}, "int4"),
        ({"kv_cache_dtype": "fp4"}, "fp8"),
        ({"headroom": -0.1}, "--headroom"),
        ({"headroom": math.nan}, "--headroom"),
        ({"spares": -1}, "--spares"),
        ({"probability": 1.0}, "never certain"),
        ({"probability": 0.1}, "0.5"),
        ({"objective": "beauty"}, "cost, power, gpus, latency"),
        ({"router": "random"}, "round_robin"),
        ({"max_model_len": 1}, "--max-model-len"),
        ({"draws": 1}, "--draws"),
        ({"seed": -1}, "--seed"),
        ({"traffic": TrafficOptions(source="chat")}, "--rate"),
        ({"traffic": TrafficOptions(source="chat", load_factor=1.0)}, "--load"),
        ({"traffic": TrafficOptions(source="chat", rate=math.inf)}, "--rate inf"),
        ({"traffic": TrafficOptions(source="chat", rate=5.0, duration_s=9.0)}, "--duration"),
        ({"traffic": TrafficOptions(source="chat", rate=5.0, requests=9)}, "--requests"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as refused:
        asked(**changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shares_are_read_with_or_without_percent() -> None:
    assert parse_share("25%", "--headroom") == pytest.approx(0.25)
    assert parse_share("0.25", "--headroom") == pytest.approx(0.25)
    for text in ("much", "", "inf", "nan%"):
        with pytest.raises(BadInput, match="--headroom"):
            parse_share(text, "--headroom")


def test_names_are_kept_once_and_in_order() -> None:
    assert split_names("l40s, h100 ,l40s", "--gpus") == ("l40s", "h100")
    with pytest.raises(BadInput, match="names nothing"):
        split_names(" , ", "--gpus")
