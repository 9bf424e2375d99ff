"""A server's own figures are read while it is loaded, and never stand in the way of the load."""

from __future__ import annotations

import itertools
import time

import pytest

from autotune.load.server_watch import ServerWatch
from tests.autotune.load.fake_server import FakeServer, serving


def growing(server: FakeServer) -> str:
    """A page whose counters grow by one with each reading."""
    number = next(NUMBERS)
    return f"vllm:num_preemptions_total {number}\nvllm:num_requests_running {number % 3}\n"


NUMBERS = itertools.count(1)


def test_of_a_long_load_not_every_page_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.load.server_watch._INTERVAL_S", 0.005)
    monkeypatch.setattr("autotune.load.server_watch._MOST_SCRAPES", 6)
    before = next(NUMBERS)
    with serving(FakeServer(metrics=growing)) as server:
        with ServerWatch(f"{server.url}/metrics") as watch:
            until = time.monotonic() + 20
            while next(NUMBERS) < before + 100 and time.monotonic() < until:
                time.sleep(0.01)
        kept = watch._scrapes
    assert 2 <= len(kept) <= 8
    preemptions = [scrape.series["vllm:num_preemptions"][()] for scrape in kept]
    # From the first reading to the last, whatever was dropped between.
    assert preemptions == sorted(preemptions)
    assert watch.figures().engine["preemptions"] == preemptions[-1] - preemptions[0] >= 90


def test_the_key_is_sent_and_no_proxy_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # The load goes to the server itself, whatever the environment says.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(FakeServer(metrics=growing, key="k")) as server:
        for key, problem in (("k", None), (None, "HTTP error 401")):
            with ServerWatch(f"{server.url}/metrics", key) as watch:
                pass
            figures = watch.figures()
            assert (figures.engine["preemptions"] is None) == (key is None)
            assert (figures.problem is None) if problem is None else problem in str(figures.problem)


def test_what_is_no_metrics_page_is_told() -> None:
    fake = FakeServer(metrics=lambda _: "<html>")
    with serving(fake), ServerWatch(f"{fake.url}/metrics") as watch:
        pass
    assert "a web page" in str(watch.figures().problem)
    assert set(watch.figures().engine.values()) == {None}
