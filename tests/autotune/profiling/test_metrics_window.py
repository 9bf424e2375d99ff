"""Counters and histograms over a window, against the observations that made them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from autotune.profiling.metrics_window import Histogram, Window
from autotune.profiling.prometheus_scrape import Scrape, parse_metrics
from tests.autotune.profiling.metrics_pages import SECONDS, histogram, single


def read(text: str, at_s: float = 0.0) -> Scrape:
    return parse_metrics(text, at_s, "http://test")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.95, 0.99, 1.0])
def test_the_true_quantile_lies_in_the_interval(seed: int, share: float) -> None:
    rng = random.Random(seed)
    values = [rng.lognormvariate(-3, 1.5) for _ in range(rng.randrange(1, 200))]
    pages = [histogram("x", values[:0], SECONDS), histogram("x", values, SECONDS)]
    window = Window([read(page, at) for at, page in enumerate(pages)])
    found = window.histogram(("x",))
    assert found is not None
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    quantile = found.quantile(share)
    assert quantile is not None
    true = float(np.percentile(values, 100 * share))
    assert quantile.low <= true <= quantile.high
    assert quantile.low <= quantile.value <= quantile.high


def test_the_interval_of_a_quantile_is_its_bucket() -> None:
    found = Histogram((0.1, 0.25, math.inf), (90.0, 10.0, 0.0), 12.0)
    quantile = found.quantile(0.95)
    assert quantile is not None
    assert (quantile.low, quantile.high) == (0.1, 0.25)
    assert quantile.value == pytest.approx(0.1 + 0.15 * 0.455)


def test_what_was_there_before_the_window_does_not_count() -> None:
    before = histogram("x", [5.0] * 50, SECONDS) + single("c_total", "counter", 100)
    after = histogram("x", [5.0] * 50 + [0.03] * 30, SECONDS) + single("c_total", "counter", 107)
    window = Window([read(before), read(after, 2.0)])
    found = window.histogram(("x",))
    assert found is not None
    assert found.count == 30
    quantile = found.quantile(0.99)
    assert quantile is not None
    assert (quantile.low, quantile.high) == (0.02, 0.04)
    assert window.increase(("missing", "c")) == 7.0
    assert window.increase(("missing",)) is None
    assert window.seconds == 2.0


def test_a_counter_that_falls_began_again_at_zero() -> None:
    pages = [single("c_total", "counter", value) for value in (100, 110, 4, 9)]
    window = Window([read(page, at) for at, page in enumerate(pages)], ("c",))
    assert window.increase(("c",)) == 10 + 4 + 5
    assert window.resets == 1


def test_after_a_restart_no_counter_is_taken_for_grown_by_the_difference() -> None:
    """The histogram fell, so that the counter began again too, though it is above its old value."""
    before = histogram("x", [1.0] * 9, SECONDS) + single("c_total", "counter", 3)
    after = histogram("x", [1.0] * 2, SECONDS) + single("c_total", "counter", 5)
    window = Window([read(before), read(after, 1.0)], ("c",))
    assert window.increase(("c",)) == 5.0
    assert window.resets == 1


def test_a_series_that_appears_later_began_at_zero() -> None:
    before = '# TYPE c counter\nc_total{reason="stop"} 3\n'
    after = '# TYPE c counter\nc_total{reason="stop"} 4\nc_total{reason="abort"} 2\n'
    window = Window([read(before), read(after, 1.0)], ("c",))
    assert window.increase(("c",)) == 3.0
    assert window.increase(("c",), lambda labels: labels["reason"] == "abort") == 2.0
    assert window.resets == 0


def test_ranks_of_one_engine_count_once_and_engines_each() -> None:
    page = '# TYPE g gauge\ng{tp_rank="0",dp="0"} 3\ng{tp_rank="1",dp="0"} 3\ng{dp="1"} 4\n'
    scrape = read(page)
    window = Window([scrape, scrape])
    assert window.gauge(("g",), scrape) == 7.0
    assert window.gauge(("g",), scrape, mean=True) == 3.5


def test_an_empty_histogram_has_no_statistics() -> None:
    page = histogram("x", [], SECONDS)
    found = Window([read(page), read(page, 1.0)]).histogram(("x",))
    assert found is not None
    assert found.count == 0
    assert found.mean is None
    assert found.quantile(0.5) is None
    assert found.largest is None
