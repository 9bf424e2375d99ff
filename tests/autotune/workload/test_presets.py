import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from autotune.errors import BadInput
from autotune.workload import PRESETS, Workload, WorkloadRow, make_preset, spread_grid
from autotune.workload.arrivals import draw_arrivals, find_grid
from autotune.workload.describe import prefix_share
from autotune.workload.presets import PREFIX_BLOCK_TOKENS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_seeded(name: str) -> None:
    workload = make_preset(name, 300, 4.0, seed=5)
    assert len(workload.rows) == 300
    assert workload.rate == pytest.approx(4.0)
    assert workload.rows[0].arrival_s == 0.0
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(workload.rows))
    for row in workload.rows:
        assert row.prefix_ids is not None
        assert row.prefix_block_tokens == PREFIX_BLOCK_TOKENS
        assert row.output_tokens >= 1
        assert len(row.prefix_ids) <= math.ceil(row.input_tokens / PREFIX_BLOCK_TOKENS)
    assert make_preset(name, 300, 4.0, seed=5) == workload
    assert make_preset(name, 300, 4.0, seed=6).rows != workload.rows
    assert "synthetic" in workload.notes[0]


def test_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = (make_preset("chat", 50, rate, burstiness=b) for rate, b in ((1, 1), (9, 0.3)))
    assert [r.input_tokens for r in slow.rows] == [r.input_tokens for r in fast.rows]
    assert [r.prefix_ids for r in slow.rows] == [r.prefix_ids for r in fast.rows]


@pytest.mark.parametrize(
    ("name", "median_in", "median_out"), [("chat", 1020, 129), ("code", 1500, 13)]
)
def test_medians_are_those_of_the_traces(name: str, median_in: float, median_out: float) -> None:
    rows = make_preset(name, 4000, 1.0).rows
    assert np.median([r.input_tokens for r in rows]) == pytest.approx(median_in, rel=0.06)
    assert np.median([r.output_tokens for r in rows]) == pytest.approx(median_out, rel=0.1)


def test_summaries_and_agents_have_the_means_of_their_sources() -> None:
    rows = make_preset("summarize", 4000, 1.0).rows
    assert np.mean([r.input_tokens - 64 for r in rows]) == pytest.approx(781, rel=0.06)
    assert np.mean([r.output_tokens for r in rows]) == pytest.approx(56, rel=0.06)
    rows = make_preset("agent", 4000, 1.0).rows
    assert np.mean([r.input_tokens for r in rows]) == pytest.approx(8596, rel=0.2)
    assert np.mean([r.output_tokens for r in rows]) == pytest.approx(182, rel=0.1)


def test_presets_share_what_they_say() -> None:
    share = {name: prefix_share(make_preset(name, 1000, 1.0)) for name in PRESETS}
    assert share["agent"] > share["rag"] > share["chat"] > share["summarize"]
    assert share["agent"] > 0.7
    assert share["summarize"] < 0.1


def test_agent_sessions_grow_turn_by_turn() -> None:
    sessions: dict[str, list[WorkloadRow]] = defaultdict(list)
    for row in make_preset("agent", 600, 2.0).rows:
        assert row.session_id is not None
        sessions[row.session_id].append(row)
    assert len(sessions) > 30
    assert max(len(turns) for turns in sessions.values()) > 8
    for turns in sessions.values():
        for before, after in pairwise(turns):
            assert before.prefix_ids is not None
            assert after.prefix_ids is not None
            assert after.prefix_ids[: len(before.prefix_ids)] == before.prefix_ids
            assert after.input_tokens > before.input_tokens + before.output_tokens
    own = [set((turns[-1].prefix_ids or ())[16:]) for turns in sessions.values()]
    assert sum(len(ids) for ids in own) == len(set().union(*own))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma(burstiness: float) -> None:
    times = draw_arrivals(40_000, 5.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(0.2)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)
    # The median of Gamma(shape 1) is ln 2 of its mean.
    if burstiness == 1.0:
        assert np.median(gaps) == pytest.approx(0.2 * math.log(2), rel=0.03)


def test_bad_presets() -> None:
    with pytest.raises(BadInput, match="'chess' is not a preset; there are chat, rag, code"):
        make_preset("chess", 1, 1.0)
    with pytest.raises(BadInput, match="at least 1"):
        make_preset("chat", 0, 1.0)
    for rate, burstiness in ((0.0, 1.0), (math.nan, 1.0), (1.0, -1.0), (math.inf, 1.0)):
        with pytest.raises(BadInput, match="above 0 and finite"):
            make_preset("chat", 5, rate, burstiness=burstiness)
    assert make_preset("chat", 1, 1.0).rate is None
    assert np.isfinite(draw_arrivals(50, 1.0, 1e-9, np.random.default_rng(0))).all()


def on_grid(times: list[float]) -> Workload:
    return Workload(tuple(WorkloadRow(t, 1, 1) for t in times), "test", "mooncake")


def test_a_coarse_grid_is_found_and_spread() -> None:
    rng = np.random.default_rng(4)
    # As in Mooncake's trace: points of 2.999 to 3.001 s, some without requests.
    points = np.cumsum(rng.choice([2.999, 3.0, 3.001, 6.0], 100))
    times = sorted(float(point) for point in rng.choice(points, 400))
    times = [t - times[0] for t in times]
    assert find_grid(times) == pytest.approx(3.0, abs=0.002)
    spread = spread_grid(on_grid(times), seed=1)
    moved = [row.arrival_s for row in spread.rows]
    assert moved == sorted(moved)
    assert moved[0] == 0.0
    assert len(set(moved)) == 400
    assert find_grid(moved) is None
    assert abs(moved[-1] - times[-1]) <= 3.01
    assert "spread uniformly over their grid of 3 s (seed 1)" in spread.notes[0]
    assert spread_grid(on_grid(times), seed=1) == spread
    assert spread_grid(spread, seed=1) is spread


def test_ordinary_arrivals_lie_on_no_grid() -> None:
    rng = np.random.default_rng(2)
    assert find_grid(np.cumsum(rng.exponential(1.0, 300)).tolist()) is None
    assert find_grid([0.0] * 50) is None
    assert find_grid([]) is None
    # Bursts at irregular times.
    assert find_grid(np.repeat(np.cumsum(rng.exponential(1.0, 50)), 5).tolist()) is None
