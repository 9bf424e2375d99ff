"""Windows of traffic: rates, lengths, what the proof sees, and what is said about it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.model_info import read_model_info
from autotune.traffic import Traffic, load_traffic
from autotune.traffic_options import TrafficOptions
from engine.config import EngineConfig

CONFIG = EngineConfig(model=str(TARGET))


def traffic(options: TrafficOptions, seed: int = 0) -> Traffic:
    return load_traffic(options, read_model_info(CONFIG), CONFIG, seed)


def azure(path: Path, rows: int, gap_s: float, context: int = 100) -> str:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(rows):
        at = i * gap_s
        lines.append(f"2023-11-16 18:{int(at // 60):02d}:{at % 60:010.7f},{context},20")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_preset_windows_have_the_rate_and_differ() -> None:
    offered = traffic(TrafficOptions(source="chat")).windows(20.0, 10.0, count=3)
    assert len(offered.windows) == 3
    for window in offered.windows:
        assert len(window) == pytest.approx(200, rel=0.02)
        assert window[-1].arrival_s == pytest.approx(10.0, rel=0.05)
    first, second = ([r.arrival_s for r in w] for w in offered.windows[:2])
    assert first != second
    assert offered.description["requests"] == len(offered.windows[0])


def test_preset_is_scaled_to_the_models_context_and_says_so() -> None:
    offered = traffic(TrafficOptions(source="chat")).windows(20.0, 10.0, count=1)
    assert offered.description["scaling"]["lengths"] == 0.25
    assert any("0.25" in note for note in offered.notes)
    assert all(len(r.token_ids) + r.output_tokens <= 2048 for r in offered.windows[0])


def test_file_windows_are_successive_stretches(tmp_path: Path) -> None:
    source = azure(tmp_path / "t.csv", rows=100, gap_s=0.5)
    offered = traffic(TrafficOptions(source=source)).windows(None, 10.0, count=3)
    assert [len(w) for w in offered.windows] == [20, 20, 20]
    assert all(w[0].arrival_s == 0.0 for w in offered.windows)
    # Each window has prompts of its own: no window is answered from another's prefixes.
    assert len({r.token_ids for w in offered.windows for r in w}) == 60


def test_rate_of_a_file_is_scaled(tmp_path: Path) -> None:
    source = azure(tmp_path / "t.csv", rows=200, gap_s=0.5)
    offered = traffic(TrafficOptions(source=source, rate=10.0)).windows(10.0, 5.0, count=2)
    assert [len(w) for w in offered.windows] == [50, 50]


def test_short_file_proves_on_what_was_seen_and_says_so(tmp_path: Path) -> None:
    source = azure(tmp_path / "t.csv", rows=10, gap_s=0.5)
    offered = traffic(TrafficOptions(source=source)).windows(None, 12.0, count=5)
    assert len(offered.windows) == 1
    assert offered.windows[0][-1].arrival_s >= 11
    assert any("proved on traffic that the search had seen" in note for note in offered.notes)


def test_infinite_rate_offers_all_at_once(tmp_path: Path) -> None:
    source = azure(tmp_path / "t.csv", rows=100, gap_s=0.5)
    options = TrafficOptions(source=source, rate=math.inf, requests=30)
    offered = traffic(options).windows(math.inf, 5.0, count=5)
    assert [len(w) for w in offered.windows] == [30, 30, 30]
    assert {r.arrival_s for w in offered.windows for r in w} == {0.0}


def test_lengths_beyond_the_model_are_clipped_and_said(tmp_path: Path) -> None:
    source = azure(tmp_path / "t.csv", rows=40, gap_s=0.5, context=9000)
    offered = traffic(TrafficOptions(source=source)).windows(None, 10.0, count=1)
    assert all(len(r.token_ids) + r.output_tokens <= 2048 for r in offered.windows[0])
    assert any("shortened to 2048" in note for note in offered.notes)


def test_same_seed_same_traffic_and_another_seed_another() -> None:
    def prompts(seed: int) -> list[tuple[int, ...]]:
        offered = traffic(TrafficOptions(source="rag"), seed).windows(5.0, 5.0, count=1)
        return [r.token_ids for r in offered.windows[0]]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_prompts_without_times_need_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "def f(x):"}\n{"prompt": "import os"}\n')
    source = traffic(TrafficOptions(source=str(file)))
    with pytest.raises(BadInput, match="--rate"):
        source.windows(None, 5.0, count=1)
    offered = source.windows(2.0, 5.0, count=1)
    assert len(offered.windows[0]) >= 8


def test_a_single_request_is_offered_at_the_rate(tmp_path: Path) -> None:
    source = traffic(TrafficOptions(source=azure(tmp_path / "t.csv", rows=1, gap_s=1.0)))
    offered = source.windows(4.0, 5.0, count=1)
    assert len(offered.windows[0]) > 10
    assert len({r.arrival_s for r in offered.windows[0]}) > 10
    assert any("only request" in note for note in offered.notes)


def test_burst_has_no_gaps() -> None:
    requests = traffic(TrafficOptions(source="code")).burst(16)
    assert len(requests) == 16
    assert {r.arrival_s for r in requests} == {0.0}


def test_unknown_source_lists_the_presets() -> None:
    with pytest.raises(BadInput, match="chat, rag, code"):
        traffic(TrafficOptions(source="chta"))


@pytest.mark.parametrize("field", ["rate", "load_factor", "length_factor", "duration_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_values_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadInput):
        TrafficOptions(**{field: value})
