"""A trace is a file that viewers open, of the steps that were asked for, in time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.profiling.torch_trace import trace_load
from autotune.profiling.trace_steps import TraceSteps, parse_trace_steps
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(model=str(TARGET), device="cpu", num_threads=1, max_num_seqs=4)
    loaded = load_model(config)
    yield loaded.engine(config)
    loaded.close()


def load(count: int = 2, output: int = 12) -> list[LoadRequest]:
    return [LoadRequest(str(i), 0.0, tuple(range(1, 20)), output) for i in range(count)]


def test_trace_holds_the_steps_asked_for_with_their_records(engine: Engine, tmp_path: Path) -> None:
    before = engine.on_step
    trace = trace_load(engine, load(), TraceSteps(3, 5), tmp_path / "t.json", drain_limit=30)
    assert trace is not None
    assert trace.steps == [3, 4, 5]
    assert engine.on_step is before
    assert not engine.has_unfinished
    content: dict[str, Any] = json.loads((tmp_path / "t.json").read_text())
    events = content["traceEvents"]
    assert len(events) == trace.events
    slices = [e for e in events if e["ph"] == "X"]
    # What the Chrome trace format asks of a complete event.
    assert all(
        isinstance(e["ts"], int | float) and e["dur"] >= 0 and "pid" in e and "tid" in e
        for e in slices
    )
    steps = {e["name"]: e for e in slices if e["name"].startswith("step ")}
    assert sorted(steps) == ["step 3", "step 4", "step 5"]
    starts = [steps[f"step {n}"]["ts"] for n in (3, 4, 5)]
    assert starts == sorted(starts)
    assert steps["step 4"]["args"]["decode_sequences"] == 2
    within = steps["step 4"]
    inside = [
        e
        for e in slices
        if e.get("cat") == "cpu_op" and within["ts"] <= e["ts"] <= within["ts"] + within["dur"]
    ]
    assert len(inside) > 10, "the step's own operations are in its slice"
    curve = [e for e in events if e["ph"] == "C" and e["name"] == "requests"]
    assert [e["args"] for e in curve] == [{"running": 2, "waiting": 0}] * 3


def test_trace_ends_after_its_steps(engine: Engine, tmp_path: Path) -> None:
    waits = [*load(1), LoadRequest("late", 60.0, (1, 2, 3), 2)]
    trace = trace_load(engine, waits, TraceSteps(0, 1), tmp_path / "t.json", drain_limit=30)
    assert trace is not None
    assert trace.steps == [0, 1]


def test_steps_beyond_the_load_are_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--trace-steps 500:601 begins after the load's last step"):
        trace_load(engine, load(), TraceSteps(500, 600), tmp_path / "t.json", drain_limit=30)
    assert not list(tmp_path.iterdir())


def test_load_that_ends_first_leaves_the_steps_that_there_were(
    engine: Engine, tmp_path: Path
) -> None:
    trace = trace_load(engine, load(1, 4), TraceSteps(2, 90), tmp_path / "t.json", drain_limit=30)
    assert trace is not None
    assert trace.steps == [2, 3]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_stop_ends_the_load_of_the_trace(engine: Engine, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    file = tmp_path / "t.json"
    trace = trace_load(engine, load(), TraceSteps(0, 1), file, drain_limit=30, stop=stop)
    assert trace is None
    assert not file.exists()
    assert not engine.has_unfinished


def test_ranges_of_steps_are_read_as_python_slices_are() -> None:
    steps = parse_trace_steps(" 20:30 ")
    assert (20 in steps, 29 in steps, 30 in steps, 19 in steps) == (True, True, False, False)
    assert str(steps) == "20:30"


@pytest.mark.parametrize("text", ["", "20", "20-30", "30:20", "5:5", "-1:4", "0:5000", "a:b"])
def test_other_ranges_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match=r"--trace-steps .*(instance|above)"):
        parse_trace_steps(text)
