"""The share of a traffic that one replica gets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.errors import BadInput
from autotune.planning.planned_traffic import LengthSample, PlannedTraffic, plan_traffic
from autotune.traffic_options import TrafficOptions

HERE = Path(__file__)


def planned(limit: int = 8192, *, sticky: bool = False, **options: Any) -> PlannedTraffic:
    given = {"source": "chat", "rate": 10.0, **options}
    return plan_traffic(TrafficOptions(**given), HERE, limit, sticky=sticky, seed=0)


def variation(traffic: PlannedTraffic, parts: int) -> float:
    gaps = np.diff([r.arrival_s for r in traffic.stream(2.0, 3000, parts, 0)])
    return float(np.var(gaps) / np.mean(gaps) ** 2)


def trace(path: Path, rows: int, gap: float = 0.5) -> Path:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(rows):
        seconds = i * gap
        stamp = f"2023-11-16 18:{int(seconds // 60):02d}:{seconds % 60:010.7f}"
        lines.append(f"{stamp},{100 + i},{10 + i % 7}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_stream_has_the_rate_that_is_asked_and_the_same_requests_at_any() -> None:
    traffic = planned()
    slow, fast = (traffic.stream(rate, 200, 1, 3) for rate in (2.0, 7.0))
    assert (len(slow) - 1) / slow[-1].arrival_s == pytest.approx(2.0)
    assert [(r.token_ids, r.output_tokens) for r in slow] == [
        (r.token_ids, r.output_tokens) for r in fast
    ]
    assert [r.arrival_s * 2 for r in slow] == pytest.approx([r.arrival_s * 7 for r in fast])


def test_draws_differ_and_repeat() -> None:
    assert planned().stream(2.0, 64, 2, 0) == planned().stream(2.0, 64, 2, 0)
    traffic = planned()
    one, other = ([r.output_tokens for r in traffic.stream(2.0, 64, 2, draw)] for draw in (0, 1))
    assert one != other


def test_taking_turns_makes_the_arrivals_of_one_replica_more_even() -> None:
    traffic = planned()
    # The sum of n exponential gaps has a squared coefficient of variation of 1 / n.
    assert variation(traffic, 1) == pytest.approx(1.0, rel=0.15)
    assert variation(traffic, 4) == pytest.approx(0.25, rel=0.15)
    assert traffic.burstiness == 1.0
    assert planned(burstiness=0.5).burstiness == 2.0


def test_replicas_get_every_nth_row_of_a_trace(tmp_path: Path) -> None:
    file = trace(tmp_path / "trace.csv", 120)
    traffic = planned(source=str(file), rate=None)
    assert traffic.rate == pytest.approx(2.0)
    prompts = [len(r.token_ids) for r in traffic.stream(1.0, 10, 3, 0)]
    assert prompts == [100 + 3 * i for i in range(10)]
    # Beyond its end it is played again.
    longer = traffic.stream(1.0, 300, 1, 0)
    assert len(longer[120].token_ids) == 100
    assert all(b.arrival_s > a.arrival_s for a, b in pairwise(longer))


def test_a_busy_minute_is_seen(tmp_path: Path) -> None:
    file = trace(tmp_path / "even.csv", 1000)
    assert planned(source=str(file), rate=None).peak_ratio() == pytest.approx(1.0, rel=0.05)
    assert planned().peak_ratio() is None


def test_lengths_keep_the_longest_sequence(tmp_path: Path) -> None:
    traffic = planned().cut(512)
    assert max(len(r.token_ids) + r.output_tokens for r in traffic.stream(1.0, 256, 1, 0)) <= 512
    assert traffic.longest <= 512


def test_what_has_no_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a file nor a preset"):
        planned(source=str(tmp_path / "none.csv"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello there", "output_tokens": 5}\n' * 3, encoding="utf-8")
    with pytest.raises(BadInput, match="--rate"):
        planned(source=str(prompts), rate=None)
    assert planned(source=str(prompts), rate=3.0).rate == pytest.approx(3.0, rel=1e-6)


def test_contexts_are_weighed_by_how_long_answers_decode() -> None:
    sample = LengthSample(
        np.array([100.0, 100.0]), np.array([100.0, 100.0]), np.array([1.0, 201.0])
    )
    # The one-token answer never decodes: what is met is the other, half done.
    assert sample.mean_context == pytest.approx(100 + 201 / 2, rel=1e-6)
    longer = sample.scaled(2.0, 0.5, 10_000)
    assert longer.inputs.tolist() == [200.0, 200.0]
    assert longer.outputs.tolist() == [1.0, 100.0]
    short = sample.scaled(10.0, 10.0, 600)
    assert (short.inputs + short.outputs <= 600).all()
