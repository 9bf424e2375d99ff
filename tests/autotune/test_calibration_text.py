"""The workload's own prompts as the text of calibrated methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.calibration_text import LEAST_CHARACTERS, MOST_CHARACTERS, write_calibration_text
from autotune.search.tune import tune
from autotune.traffic_options import TrafficOptions
from tests.autotune.played import PlayedEvaluator
from tests.autotune.search.test_tune import options


def test_too_little_text_is_none(tmp_path: Path) -> None:
    assert write_calibration_text(tmp_path, []) is None
    assert write_calibration_text(tmp_path, ["x" * (LEAST_CHARACTERS - 1)]) is None
    assert list(tmp_path.iterdir()) == []


def test_very_much_text_is_thinned_evenly(tmp_path: Path) -> None:
    texts = [f"{i:04d}" + "x" * 9996 for i in range(5 * MOST_CHARACTERS // 10_000)]
    path = write_calibration_text(tmp_path, texts)
    assert path is not None
    kept = path.read_text().split("\n\n")
    assert [int(text[:4]) for text in kept] == list(range(0, len(texts), 5))


def test_what_has_no_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    path = write_calibration_text(tmp_path, ["\ud800" * LEAST_CHARACTERS])
    assert path is not None
    assert path.read_text(encoding="utf-8") == "?" * LEAST_CHARACTERS


@pytest.mark.parametrize(
    ("methods", "given"), [(["none", "gptq"], True), (["none", "int8"], False)]
)
def test_a_search_calibrates_on_the_prompts_of_its_workload(
    tmp_path: Path, played: type[PlayedEvaluator], methods: list[str], given: bool
) -> None:
    prompts = [f"What is {i} and why does it matter so much? " * 20 for i in range(30)]
    trace = tmp_path / "prompts.jsonl"
    trace.write_text("".join(json.dumps({"prompt": p, "output_tokens": 2}) + "\n" for p in prompts))
    settings = options(
        traffic=TrafficOptions(source=str(trace), rate=4.0, duration_s=3.0),
        trials=1,
        narrowing={**options().narrowing, "quantization": methods},
    )
    run = tune(settings, tmp_path / "out")
    path = tmp_path / "out" / "calibration.txt"
    assert path.exists() == given
    assert run["engine_config"]["calibration"] == (str(path) if given else None)
    assert any("calibration.txt" in note for note in run["result"]["notes"]) == given
    if given:
        assert path.read_text().split("\n\n") == prompts


def test_lengths_without_texts_leave_the_built_in_sample(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    settings = options(trials=1, narrowing={**options().narrowing, "quantization": ["none", "awq"]})
    assert tune(settings, tmp_path / "out")["engine_config"]["calibration"] is None
