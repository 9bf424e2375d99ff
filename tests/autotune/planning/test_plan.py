"""Whole plans: their sums agree, and they answer what cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune import PlanOptions, plan
from autotune.errors import BadInput
from autotune.planning.growth import Growth
from autotune.planning.plan import Plan
from autotune.traffic_options import TrafficOptions
from tests.autotune.planning import known_models as models

RATE = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of which there is nothing but the config."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("8b", models.LLAMA_3_8B), ("70b", models.LLAMA_3_70B)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root


def asked(folder: Path, rate: float = RATE, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "model": str(folder / "8b"),
        "traffic": TrafficOptions(source="summarize", rate=rate),
        "slo": "ttft<500ms,tpot<50ms",
        "gpus": ("h100", "l40s"),
        "tensor_parallel_sizes": (1,),
        "quantizations": ("none",),
        "draws": 8,
    }
    return plan(PlanOptions(**{**given, **changes}))


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    return asked(folder, growth=Growth(2.0, 6.0)).to_json()


def test_every_option_has_its_value_and_bounds(told: dict[str, Any]) -> None:
    assert told["slo_met"]
    assert {option["gpu"] for option in told["options"]} == {"h100-sxm", "l40s"}
    for option in told["options"]:
        assert option["feasible"]
        assert option["method"] == "simulated"
        assert option["p_meets_slo"] >= 0.9
        for bounds in (
            *option["intervals"].values(),
            *option["ttft"].values(),
            *option["tpot"].values(),
            *option["capacity"].values(),
        ):
            assert bounds["low"] <= bounds["value"] <= bounds["high"]


def test_the_sums_agree(told: dict[str, Any]) -> None:
    tokens = RATE * told["request"]["workload"]["output_tokens"]["mean"]
    for option in told["options"]:
        gpus = option["replicas"] * option["tensor_parallel_size"]
        assert option["gpus"] == gpus
        assert option["replicas"] == option["replicas_needed"] + 1
        usd = gpus * option["price"]["usd_per_gpu_hour"]
        assert option["usd_per_hour"] == pytest.approx(usd)
        assert option["usd_per_month"] == pytest.approx(730 * usd)
        assert option["output_tokens_per_s"] == pytest.approx(tokens)
        assert option["usd_per_million_tokens"] == pytest.approx(usd / (tokens * 3600) * 1e6)
        memory = option["memory"]
        assert sum(memory["parts"].values()) == memory["total_bytes"]
        # What is bought carries the burst without the spare.
        assert option["capacity"]["requests_per_s"]["value"] > RATE * 1.25
        assert option["outgrown"]["rate"] >= RATE


def test_the_cheapest_comes_first_and_breaks_even_with_the_next(told: dict[str, Any]) -> None:
    first, second = told["options"]
    assert (first["rank"], second["rank"]) == (1, 2)
    assert first["usd_per_hour"] <= second["usd_per_hour"]
    assert first["break_even_usd_per_gpu_hour"] * first["gpus"] == pytest.approx(
        second["usd_per_hour"]
    )
    assert told["frontier"][0] == 0


def test_growth_and_other_rates_take_more(told: dict[str, Any]) -> None:
    for index in (0, 1):
        replicas = [row["options"][index]["replicas"] for row in told["growth"]]
        assert replicas == sorted(replicas)
        assert replicas[-1] > replicas[0]
    assert told["growth"][2]["rate"] == pytest.approx(2 * RATE)
    months = told["options"][0]["outgrown"]["months"]
    rate = told["options"][0]["outgrown"]["rate"]
    assert RATE * 2 ** (months / 6) == pytest.approx(rate)
    rates = {row["factor"]: row for row in told["sensitivity"] if row["kind"] == "rate"}
    few, many = (rates[factor]["options"][0]["replicas"] for factor in (0.5, 2.0))
    assert few < many
    longer = next(row for row in told["sensitivity"] if row["change"] == "prompts x 1.5")
    usual = told["options"][0]["replicas"]
    assert longer["options"][0]["replicas"] >= usual


def test_the_same_question_has_the_same_answer_to_the_last_byte(folder: Path) -> None:
    one, other = (json.dumps(asked(folder, gpus=("h100",)).to_json()) for _ in range(2))
    assert one == other


def test_a_price_of_ones_own_counts_and_has_no_range(folder: Path, told: dict[str, Any]) -> None:
    dear = asked(folder, prices=("h100=90", "l40s=0.5")).to_json()["options"]
    assert dear[0]["gpu"] == "l40s"
    assert dear[0]["price"]["low"] == dear[0]["price"]["high"] == 0.5
    assert told["options"][0]["price"]["low"] < told["options"][0]["price"]["high"]


def test_headroom_spares_and_certainty_cost_replicas(folder: Path) -> None:
    def needed(**changes: Any) -> tuple[int, int]:
        option = asked(folder, rate=100.0, gpus=("l40s",), **changes).to_json()["options"][0]
        return option["replicas_needed"], option["replicas"]

    bare = needed(headroom=0.0, spares=0, probability=0.6)
    assert bare[0] == bare[1]
    assert needed(headroom=1.0, spares=0, probability=0.6)[0] > bare[0]
    assert needed(headroom=0.0, spares=2, probability=0.6)[1] == bare[0] + 2
    assert needed(headroom=0.0, spares=0, probability=0.97)[0] >= bare[0]


def test_a_model_that_fits_nowhere_is_told_what_would_hold_it(folder: Path) -> None:
    found = asked(folder, model=str(folder / "70b"), gpus=("l40s",))
    assert not found.slo_met
    told = found.to_json()
    assert [option["fits"] for option in told["options"]] == [False]
    assert told["options"][0]["binding_constraint"] == "weights"
    assert "does not fit" in told["options"][0]["reason"]
    assert told["options"][0]["memory"]["shortfall_bytes"] > 80e9
    assert any("l40s would hold it" in text for text in told["would_fit"])
    assert told["options"][0]["replicas"] is None


def test_an_slo_below_the_floor_is_told_the_floor_and_what_sets_it(folder: Path) -> None:
    found = asked(folder, slo="tpot<1ms")
    assert not found.slo_met
    text = " ".join(found.would_fit)
    assert "below the physical floor" in text
    assert "of weights at 3.35 TB/s" in text
    # 15.0 GB of weights a token at 3.35 TB/s, by hand.
    assert "4.48 ms" in text


def test_an_slo_that_is_possible_but_not_here_is_told_how_near_it_comes(folder: Path) -> None:
    found = asked(folder, slo="tpot<4.6ms", gpus=("h100",))
    assert not found.slo_met
    assert "h100-sxm none comes nearest" in " ".join(found.would_fit)


def test_more_throughput_than_is_asked_for_cannot_be_planned(folder: Path) -> None:
    found = asked(folder, slo="throughput>100000tok/s")
    assert not found.slo_met
    assert "cannot be met by any number of GPUs" in found.would_fit[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": ("h10",)}, "h100-sxm"),
        ({"prices": ("h100=free",)}, "free"),
        ({"slo": "ttft<5"}, "no unit"),
        ({"calibration": Path("nowhere")}, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_simulated(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        asked(folder, **changes)


def test_nothing_of_it_needs_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from autotune.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
        "    assert 'transformers' not in sys.modules\n"
    )
    arguments = ["plan", "--model", str(folder / "8b"), "--rate", "5", "--gpus", "h100"]
    arguments += ["--tensor-parallel-size", "1", "--quantization", "none", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["slo_met"]
