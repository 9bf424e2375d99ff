"""A calibration finds known costs again, knows what it does not know, and survives the disk."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from autotune.errors import BadInput
from autotune.predict.apply import NotPredictable
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_file import read_calibration, write_calibration
from autotune.predict.calibration_source import load_calibration
from autotune.predict.cost_model import CostDraw
from autotune.predict.replay import replay
from autotune.predict.residual_cost import CalibratedCost
from autotune.predict.step_cost import StepWork
from engine.config import EngineConfig
from engine.graph_sizes import decode_sizes
from tests.autotune.predict.calibrated_loads import (
    BLOCKS,
    CONFIG,
    HARDWARE,
    MODEL,
    TIMES,
    calibrated,
    loaded,
    played,
    swept,
    true_cost,
)
from tests.autotune.predict.played_profile import requests

INT8 = CONFIG.replace(quantization="int8")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrated(swept(CONFIG), swept(INT8), loaded(CONFIG), loaded(CONFIG, 5.0))


def _decodes(count: int, context: int = 200) -> StepWork:
    return StepWork(count, 0, count, count, count * context, 0, 0)


def _prompt(tokens: int, decodes: int = 4) -> StepWork:
    pairs = tokens * (tokens + 1) // 2
    return StepWork(tokens + decodes, 1, decodes, decodes + 1, decodes * 200, tokens, pairs)


def _works() -> list[StepWork]:
    return [*(_decodes(n) for n in (1, 3, 8, 20, 32)), *(_prompt(t) for t in (40, 150, 400))]


def _seconds(draw: CostDraw, work: StepWork) -> float:
    return draw.pace.mean * (draw.cost.device_seconds(work) + draw.cost.host_seconds(work))


@pytest.mark.parametrize("config", [CONFIG, INT8])
def test_true_costs_are_found_again(calibration: Calibration, config: EngineConfig) -> None:
    truth = true_cost(config, sigma=0.0)
    middle = calibration.middle(config)
    for work in _works():
        expected = truth.device_seconds(work) + truth.host_seconds(work)
        assert _seconds(middle, work) == pytest.approx(expected, rel=0.05)


def test_what_lies_between_steps_is_found_again(calibration: Calibration) -> None:
    found = calibration.middle(CONFIG).times
    assert found.gap == pytest.approx(TIMES.gap, rel=0.05)
    assert found.gap_sequence == pytest.approx(TIMES.gap_sequence, rel=0.05)
    assert found.arrival == pytest.approx(TIMES.arrival, rel=0.2)


def test_a_line_of_decodes_is_what_its_steps_cost(calibration: Calibration) -> None:
    for draw in (calibration.middle(INT8), *calibration.draws(INT8, 3, 1)):
        for count in (1, 7, 30):
            line = draw.cost.decode_line(count)
            assert line is not None
            for context in (3, 40, 300, 1500):
                work = _decodes(count, context)
                whole = draw.cost.device_seconds(work) + draw.cost.host_seconds(work)
                assert line.at(count * context) == pytest.approx(whole, rel=1e-9)


def test_a_load_under_a_method_that_was_only_swept_is_predicted(calibration: Calibration) -> None:
    load = requests(150, 4.0)
    measured = played(load, INT8, true_cost(INT8), keep_steps=False)
    cache = calibration.cache(INT8)
    assert cache is not None
    draw = calibration.middle(INT8)
    found = replay(load, INT8, draw.cost, cache, drain_limit=600.0, times=draw.times)
    ends = [[r.token_times[-1] - r.intended_send for r in x.records] for x in (found, measured)]
    assert statistics.fmean(ends[0]) == pytest.approx(statistics.fmean(ends[1]), rel=0.05)


def test_the_truth_lies_within_the_draws(calibration: Calibration) -> None:
    truth = true_cost(CONFIG, sigma=0.0)
    draws = calibration.draws(CONFIG, 60, 3)
    for work in _works():
        expected = truth.device_seconds(work) + truth.host_seconds(work)
        low, high = np.quantile([_seconds(draw, work) for draw in draws], (0.05, 0.95))
        assert low < expected < high
        assert high / low < 1.4


def test_draws_are_alike_for_a_seed_and_share_their_causes(calibration: Calibration) -> None:
    first, again = calibration.draws(CONFIG, 30, 5), calibration.draws(CONFIG, 30, 5)
    other = calibration.draws(CONFIG, 30, 6)
    work = _decodes(8)
    assert [_seconds(d, work) for d in first] == [_seconds(d, work) for d in again]
    assert [_seconds(d, work) for d in first] != [_seconds(d, work) for d in other]
    # More draws begin with the same ones.
    assert [_seconds(d, work) for d in calibration.draws(CONFIG, 40, 5)][:30] == [
        _seconds(d, work) for d in first
    ]
    pairs = zip(first, calibration.draws(INT8, 30, 5), strict=True)
    a, b = np.array([(_seconds(x, work), _seconds(y, work)) for x, y in pairs]).T
    assert np.corrcoef(a, b)[0, 1] > 0.5
    assert np.std(np.log(a / b)) < np.std(np.log(a)) + np.std(np.log(b))


def test_a_method_that_only_probes_know_is_less_certain(calibration: Calibration) -> None:
    unseen = CONFIG.replace(kv_cache_dtype="int8")
    truth, work = true_cost(unseen, sigma=0.0), _decodes(16, 800)
    expected = truth.device_seconds(work) + truth.host_seconds(work)
    assert _seconds(calibration.middle(unseen), work) == pytest.approx(expected, rel=0.1)

    def spread(config: EngineConfig) -> float:
        return float(np.std([np.log(_seconds(d, work)) for d in calibration.draws(config, 400, 0)]))

    assert spread(unseen) > 1.2 * spread(CONFIG)


def test_a_bend_that_the_sum_has_not_is_learned() -> None:
    """Prompts of middling size take longer by a quarter: no coefficient can say that."""
    bent = calibrated(swept(CONFIG, bend=0.25), *(loaded(CONFIG, r, bend=0.25) for r in (3.0, 5.0)))
    truth = true_cost(CONFIG, bend=0.25, sigma=0.0)
    cost = bent.middle(CONFIG).cost
    assert isinstance(cost, CalibratedCost)
    left, before = [], []
    for work in (_prompt(t) for t in (60, 100, 150, 200)):
        true = truth.device_seconds(work)
        left.append(abs(math.log(cost.device_seconds(work) / true)))
        before.append(abs(math.log(cost.cost.device_seconds(work) / true)))
    assert statistics.fmean(left) < 0.6 * statistics.fmean(before)
    assert max(left) < 0.15
    for work in (_decodes(n) for n in (1, 3, 8, 20, 32)):
        true = truth.device_seconds(work)
        assert cost.device_seconds(work) == pytest.approx(true, rel=0.03)


def test_loads_at_other_speeds_are_no_property_of_their_steps() -> None:
    """A load in a slow hour: the sum stays, the pace lies between, and draws are wider."""
    steady = calibrated(swept(CONFIG), *(loaded(CONFIG, r) for r in (2.0, 3.0, 4.0)))
    speeds = {2.0: 0.9, 3.0: 1.0, 4.0: 1.2}
    drifting = calibrated(swept(CONFIG), *(loaded(CONFIG, r, speed=s) for r, s in speeds.items()))
    assert drifting.fits.drift > 1.5 * steady.fits.drift
    work = _decodes(8)
    first = steady.middle(CONFIG).cost.device_seconds(work)
    assert drifting.middle(CONFIG).cost.device_seconds(work) == pytest.approx(first, rel=0.04)
    assert 0.95 < drifting.middle(CONFIG).pace.mean < 1.15


def test_a_stall_is_neither_in_the_cost_nor_in_the_pace() -> None:
    load = loaded(CONFIG)
    middle = len(load.steps) // 2
    stalled = [
        dataclasses.replace(step, device_seconds=30 * step.device_seconds)
        if abs(place - middle) < 25
        else step
        for place, step in enumerate(load.steps)
    ]
    found = calibrated(swept(CONFIG), dataclasses.replace(load, steps=stalled))
    clean = calibrated(swept(CONFIG), load)
    for work in _works():
        assert _seconds(found.middle(CONFIG), work) == pytest.approx(
            _seconds(clean.middle(CONFIG), work), rel=0.04
        )


def test_further_loads_narrow_what_probes_alone_knew(calibration: Calibration) -> None:
    unseen = CONFIG.replace(kv_cache_dtype="int8")
    refitted = calibration.refitted([loaded(unseen)])
    assert refitted.fits.methods["none", "int8"].steps > 0
    work = _decodes(16, 800)
    before, after = (
        np.std([np.log(_seconds(d, work)) for d in c.draws(unseen, 60, 0)])
        for c in (calibration, refitted)
    )
    assert after < before


def test_steps_of_decodes_are_padded_to_the_captured_sizes_on_a_gpu(
    calibration: Calibration,
) -> None:
    on_gpu = dataclasses.replace(calibration, hardware={**HARDWARE, "device": "cuda"})
    cost = on_gpu.middle(CONFIG).cost
    ladder = decode_sizes(256)
    assert {9, 17} & set(ladder) == set()
    # From 9 to 16 sequences the linear layers compute 16 rows; only attention and host grow.
    rows = [cost.device_seconds(_decodes(count, 0)) for count in (9, 16)]
    plain = [calibration.middle(CONFIG).cost.device_seconds(_decodes(c, 0)) for c in (9, 16)]
    assert rows[1] == pytest.approx(plain[1])
    assert rows[0] > plain[0]
    line = cost.decode_line(9)
    assert line is not None
    assert line.at(0) == pytest.approx(rows[0] + cost.host_seconds(_decodes(9, 0)))


def test_more_ranks_split_the_work_and_talk_to_each_other(calibration: Calibration) -> None:
    two = CONFIG.replace(tensor_parallel_size=2)
    work = _prompt(1500)
    alone = calibration.middle(CONFIG).cost.device_seconds(work)
    # On a processor ranks share its cores.
    assert calibration.middle(two).cost.device_seconds(work) > alone
    on_gpu = dataclasses.replace(calibration, hardware={**HARDWARE, "device": "cuda"})
    split = on_gpu.middle(two).cost.device_seconds(work)
    assert 0.4 * alone < split < 0.75 * alone
    draws = [d.cost.device_seconds(work) for d in on_gpu.draws(two, 40, 0)]
    ones = [d.cost.device_seconds(work) for d in on_gpu.draws(CONFIG, 40, 0)]
    assert np.std(np.log(draws)) > np.std(np.log(ones))


def test_knobs_that_nothing_was_measured_of_are_refused(calibration: Calibration) -> None:
    with pytest.raises(NotPredictable, match="num_threads"):
        dataclasses.replace(calibration, config=CONFIG.replace(num_threads=1)).middle(
            CONFIG.replace(num_threads=2)
        )
    with pytest.raises(NotPredictable, match="quantization=int4"):
        calibration.middle(CONFIG.replace(quantization="int4"))
    with pytest.raises(NotPredictable, match="quantization=int4"):
        calibration.draws(CONFIG.replace(quantization="int4"), 2, 0)


def test_the_cache_is_the_measured_one_and_follows_its_knobs(calibration: Calibration) -> None:
    own = calibration.cache(CONFIG)
    assert own is not None
    assert own.num_blocks == BLOCKS
    assert own.max_model_len == MODEL.max_model_len
    half = CONFIG.replace(kv_cache_memory_bytes=int(1000 * 16 * MODEL.kv_bytes_per_token))
    small = calibration.cache(half)
    assert small is not None
    assert small.num_blocks == 1000
    none = CONFIG.replace(kv_cache_memory_bytes=int(10 * 16 * MODEL.kv_bytes_per_token))
    assert calibration.cache(none) is None


def test_another_release_or_machine_widens_and_another_model_is_refused(
    calibration: Calibration,
) -> None:
    same = calibration.checked("1.0", MODEL.fingerprint, HARDWARE)
    assert same.warnings == ()
    assert same.wider == 0
    work = _decodes(8)

    def spread(model: Calibration) -> float:
        return float(np.std([np.log(_seconds(d, work)) for d in model.draws(CONFIG, 80, 0)]))

    newer = calibration.checked("1.1", MODEL.fingerprint, HARDWARE)
    assert len(newer.warnings) == 1
    assert "1.0" in newer.warnings[0]
    assert "1.1" in newer.warnings[0]
    assert spread(newer) > 1.3 * spread(calibration)
    other = calibration.checked("1.0", None, {**HARDWARE, "name": "a faster one"})
    assert "a faster one" in other.warnings[0]
    assert spread(other) > spread(newer)
    with pytest.raises(BadInput, match="another model"):
        calibration.checked("1.0", "not this model's", HARDWARE)


def test_it_is_the_same_after_the_disk(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    write_calibration(file, calibration)
    read = load_calibration(tmp_path)
    assert read.config == calibration.config
    for config in (CONFIG, INT8, CONFIG.replace(kv_cache_dtype="int8")):
        for mine, its in zip(
            calibration.draws(config, 4, 2), read.draws(config, 4, 2), strict=True
        ):
            assert its.times == mine.times
            assert its.pace.mean == mine.pace.mean
            for work in _works():
                assert its.cost.device_seconds(work) == mine.cost.device_seconds(work)
    # What it rests on is there too: it can be refitted.
    again = read.refitted([])
    work = _decodes(8)
    assert _seconds(again.middle(CONFIG), work) == pytest.approx(
        _seconds(calibration.middle(CONFIG), work), rel=1e-3
    )


def test_a_damaged_file_is_told_in_one_sentence(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    write_calibration(file, calibration)
    whole = json.loads(file.read_text())
    damages = {
        "version": {**whole, "calibration_version": 99},
        "methods": {**whole, "methods": "none"},
        "no measured method": {**whole, "methods": []},
        "as many seconds as steps": {
            **whole,
            "samples": [{**whole["samples"][0], "host": [1.0]}],
        },
    }
    for said, content in damages.items():
        file.write_text(json.dumps(content))
        with pytest.raises(BadInput, match=said) as caught:
            read_calibration(file)
        assert "\n" not in str(caught.value)
    file.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        read_calibration(file)
    with pytest.raises(BadInput, match="does not exist"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="neither"):
        load_calibration(tmp_path / "empty")


def test_a_calibration_without_steps_says_so() -> None:
    with pytest.raises(ValueError, match="a load with steps"):
        calibrated()
    with pytest.raises(ValueError, match="at least 8 steps"):
        calibrated(dataclasses.replace(loaded(CONFIG), steps=loaded(CONFIG).steps[:5]))
