"""Advice as a person reads it on a terminal of 80 columns, and of 160."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from autotune.advise.advice import Advice, AdviceList
from autotune.cli.advise_summary import print_advice
from autotune.cli.binding_limit import binding_limit
from autotune.diagnose.finding import Diagnosis
from autotune.predict.gain import PredictedGain
from autotune.profiling.schema import Source
from tests.autotune.advise import situations


def gain(value: float, metric: str = "tpot") -> PredictedGain:
    return PredictedGain(metric, value, value * 0.8, value * 1.2, "replay", "p95")


def piece(technique: str, title: str, predicted: PredictedGain | None, **others: Any) -> Advice:
    values: dict[str, Any] = {
        "category": "model",
        "problems": ("decode_weights",),
        "role": "primary",
        "knobs": {},
        "opens": {},
        "gains": () if predicted is None else (predicted,),
        "confidence": "medium",
        "effort": "knob",
        "trade_off": "",
        "check": "",
        "why": "",
        "testable": True,
    }
    return Advice(technique=technique, title=title, gain=predicted, **{**values, **others})


ADVICE = AdviceList(
    (
        piece(
            "int8_cpu",
            "int8 weights and activations on the CPU's integer units",
            gain(1.5),
            knobs={"quantization": "int8"},
            effort="reload",
        ),
        piece("kv_int8", "int8 KV cache", gain(1.0), gains=(gain(1.0), gain(1.7, "ttft"))),
        piece("sjf", "Shortest job first", gain(1.2), breaks="ttft<1s"),
        piece("cloud_gpu", "A small GPU", gain(20.0), effort="buy", testable=False),
        piece("streaming", "Stream the answers", None, effort="deploy", testable=False),
    ),
    first="int8_cpu",
)


def printed(width: int, advice: AdviceList = ADVICE, **changes: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    print_advice(situations.profile(**changes), Diagnosis(()), advice, console=console)
    return out.getvalue()


def group(text: str, title: str) -> list[str]:
    """The lines of a group of the list, up to the next empty one."""
    lines = [line.rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    return lines[start : lines.index("", start)]


def test_what_can_be_tried_and_what_cannot_are_ranked_apart() -> None:
    text = printed(160)
    here, beyond = group(text, "To try here, by TPOT p95"), group(text, "Beyond the bundled engine")
    assert [line.split()[0] for line in here] == ["1", "2", "3"]
    assert [line.split()[0] for line in beyond] == ["1", "2"]
    assert here[0] == (
        "1  1.50x (1.20 to 1.80)  int8 weights and activations on the CPU's integer units "
        "(quantization=int8); a reload, medium confidence"
    )
    assert "A small GPU; hardware" in beyond[0]
    assert beyond[1].split()[1] == "-"


def test_it_is_read_at_80_columns() -> None:
    text = printed(80)
    lines = [*group(text, "To try here"), *group(text, "Beyond the bundled engine")]
    assert max(map(len, lines)) <= 80
    # Nothing takes more than two lines.
    assert len(lines) <= 2 * len(ADVICE.advice)
    assert "int8 weights and activations on the CPU's integer units" in " ".join(
        " ".join(lines).split()
    )


def test_what_speaks_for_it_and_against_it_stands_beside() -> None:
    here = group(printed(160), "To try here")
    assert "; TTFT p95 1.70x" in here[1]
    assert here[2].endswith("; breaks ttft<1s")
    assert "TTFT" not in here[0]


def test_advice_for_another_server_is_called_so() -> None:
    beyond = AdviceList(ADVICE.advice[3:], first="streaming")
    text = printed(160, beyond, source=Source(kind="metrics", server="vllm"))
    assert "For that server, by TPOT p95" in text
    assert "To try here" not in text


@pytest.mark.parametrize(
    ("limit", "ratio", "told"),
    [
        ("tpot<1ms", 45.9, "tpot<1ms binds: missed, at 45.9 times the limit"),
        ("tpot<1us", 45900.0, "tpot<1us binds: missed, at 45,900 times the limit"),
        ("ttft<200ms", 0.5, "ttft<200ms binds: met, at 0.5 times the limit"),
        ("throughput>500tok/s", 2.0, "throughput>500tok/s binds: missed, at 0.5 times the limit"),
        ("goodput>=0.9", 0.95, "goodput>=0.9 binds: met, at 1.05 times the limit"),
        ("ttft<1s", None, "ttft<1s binds: missed, too few requests finished to say by how much"),
    ],
)
def test_the_binding_limit_is_told_in_its_own_direction(
    limit: str, ratio: float | None, told: str
) -> None:
    assert binding_limit(limit, ratio) == told
