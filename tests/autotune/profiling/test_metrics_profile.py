"""Profiles of servers that are watched from outside, through real endpoints."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from autotune.errors import BadInput, EnvironmentMissing
from autotune.profiling import metrics_sampling, prometheus_scrape
from autotune.profiling.metrics_profile import profile_of, sample_metrics
from autotune.profiling.metrics_sampling import Sampled
from autotune.profiling.prometheus_scrape import metrics_url, parse_metrics
from autotune.profiling.schema import ModelFacts, Profile
from autotune.profiling.server_dialects import dialect_of
from autotune.slo import parse_slo
from tests.autotune.profiling.metrics_pages import (
    Answer,
    Served,
    endpoint,
    histogram,
    sglang_page,
    tgi_page,
    vllm_page,
)

URL = "http://test/metrics"
MODEL = ModelFacts(
    name="m",
    parameters=1_000_000,
    matmul_parameters=900_000,
    head_parameters=100_000,
    weight_bytes=2_000_000,
    resident_bytes=2_000_000,
    kv_bytes_per_token=1024.0,
    attention_features=1000,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    vocab_size=1000,
    max_model_len=4096,
    weight_bits=16,
    dtype="bfloat16",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a fraction of a second, and no proxy between the test and its server."""
    monkeypatch.setattr(metrics_sampling, "_LEAST_INTERVAL_S", 0.02)
    monkeypatch.setenv("no_proxy", "*")


def traffic(served: Served, count: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        queue = rng.uniform(0.0, 0.02)
        served.serve(
            ttft=queue + rng.uniform(0.05, 0.3),
            tpot=rng.uniform(0.005, 0.05),
            inputs=rng.randrange(50, 300),
            outputs=rng.randrange(2, 60),
            queue=queue,
        )


def watched(
    page: Callable[[Served], str], *, slo: str | None = None, model: ModelFacts | None = None
) -> tuple[Profile, Served]:
    """The profile of 200 requests within 10 s, after 50 that came before; and those 200."""
    served, new = Served(), Served()
    traffic(served, 50, seed=1)
    served.running = 2
    texts = [page(served)]
    for part in range(10):
        traffic(served, 20, seed=2 + part)
        traffic(new, 20, seed=2 + part)
        served.cached += 500
        served.usage = 0.3 + 0.05 * part
        texts.append(page(served))
    scrapes = tuple(parse_metrics(text, float(at), URL) for at, text in enumerate(texts))
    sampled = Sampled(URL, dialect_of(scrapes[0], URL), scrapes, ())
    return profile_of(sampled, slo=parse_slo(slo) if slo else None, model=model), new


def assert_brackets(profile: Profile, metric: str, values: list[float]) -> None:
    metrics = profile.metrics
    assert metrics is not None
    found = metrics[metric]
    assert found["mean"] == pytest.approx(np.mean(values))
    for name in ("p50", "p90", "p95", "p99"):
        low, high = found["intervals"][name]
        assert low <= np.percentile(values, float(name[1:])) <= high
        assert low <= found[name] <= high


@pytest.mark.parametrize("old", [False, True])
def test_vllm_is_read_under_its_new_and_old_names(old: bool) -> None:
    profile, new = watched(lambda served: vllm_page(served, old=old))
    assert profile.source.server == "vllm"
    assert profile.source.window_s == 10.0
    assert profile.traffic.requests == profile.traffic.completed == 200
    assert profile.traffic.rate == 20.0
    assert profile.metrics is not None
    assert profile.metrics["output_tokens_per_s"] == pytest.approx(sum(new.outputs) / 10)
    assert_brackets(profile, "ttft", new.ttft)
    assert_brackets(profile, "e2e", new.e2e)
    assert_brackets(profile, "itl", new.gaps)
    assert_brackets(profile, "tpot", new.gaps if old else new.tpot)
    assert any("percentiles are of single gaps" in note for note in profile.notes) is old
    assert profile.traffic.input_tokens is not None
    assert profile.traffic.input_tokens.mean == pytest.approx(np.mean(new.inputs))
    assert profile.kv.occupancy_peak == pytest.approx(0.75)
    assert profile.queueing.running_mean == 2.0
    assert len(profile.series) == 11


def test_the_cache_and_the_wait_of_a_new_vllm_are_told() -> None:
    profile, new = watched(vllm_page, model=MODEL)
    assert profile.kv.hit_rate == pytest.approx(5000 / sum(new.inputs))
    assert (profile.kv.block_size, profile.kv.blocks_total) == (16, 1000)
    assert profile.kv.total_bytes == 16_000 * 1024
    lengths = float(np.mean(new.inputs) + np.mean(new.outputs))
    assert profile.kv.seats == pytest.approx(16_000 / lengths)
    assert profile.queueing.wait is not None
    assert profile.queueing.wait.mean == pytest.approx(np.mean(new.queue))
    ttft = profile.breakdown("ttft")
    assert ttft is not None
    assert ttft.parts["queue"] == pytest.approx(np.mean(new.queue) / np.mean(new.ttft))
    assert sum(ttft.parts.values()) == pytest.approx(1.0)
    assert ttft.parts["prefill_attention"] > 0


def test_sglang_counts_the_ranks_of_an_engine_once() -> None:
    profile, new = watched(lambda served: sglang_page(served, ranks=4))
    assert profile.source.server == "sglang"
    assert profile.traffic.completed == 200
    assert profile.queueing.running_mean == 2.0
    assert profile.kv.hit_rate == pytest.approx(5000 / sum(new.inputs))
    assert_brackets(profile, "ttft", new.ttft)
    assert_brackets(profile, "tpot", new.gaps)
    assert profile.traffic.input_tokens is None
    assert profile.traffic.prompt_output_ratio == pytest.approx(sum(new.inputs) / sum(new.outputs))
    assert any("--collect-tokens-histogram" in note for note in profile.notes)


def test_lengths_that_sglang_tells_are_not_asked_for() -> None:
    def page(served: Served) -> str:
        name, bounds = "sglang:prompt_tokens_histogram", (10.0, 100.0, 1000.0, 10000.0)
        return sglang_page(served) + histogram(name, served.inputs, bounds)

    profile, new = watched(page)
    assert profile.traffic.input_tokens is not None
    assert profile.traffic.input_tokens.mean == pytest.approx(np.mean(new.inputs))
    assert not any("--collect-tokens-histogram" in note for note in profile.notes)


def test_tgi_tells_its_phases_but_no_time_to_first_token() -> None:
    profile, new = watched(tgi_page)
    assert profile.source.server == "tgi"
    assert profile.metrics is not None
    assert profile.metrics["ttft"]["p95"] is None
    assert any("time to the first token" in sentence for sentence in profile.partial)
    assert_brackets(profile, "tpot", new.tpot)
    prefill, decode = profile.phase("prefill"), profile.phase("decode")
    assert prefill is not None
    assert decode is not None
    assert prefill.steps == 200
    assert decode.seconds == pytest.approx(sum(new.gaps))
    assert decode.host_seconds == pytest.approx(0.1 * sum(new.gaps))
    assert decode.sampled == sum(new.outputs) - 200
    assert prefill.share + decode.share == pytest.approx(1.0)


def test_llama_cpp_counts_tokens_and_tells_of_no_request() -> None:
    def page(served: Served) -> str:
        return (
            f"llamacpp:prompt_tokens_total {sum(served.inputs)}\n"
            f"llamacpp:tokens_predicted_total {sum(served.outputs)}\n"
            f"llamacpp:requests_processing {served.running}\n"
            f"llamacpp:requests_deferred {served.waiting}\n"
        )

    profile, new = watched(page)
    assert profile.source.server == "llamacpp"
    assert profile.metrics is not None
    seconds = profile.source.window_s
    assert seconds is not None
    rate = profile.metrics["output_tokens_per_s"]
    assert rate == pytest.approx(sum(new.outputs) / seconds)
    assert profile.metrics["ttft"]["p95"] is None
    assert any("time to the first token" in sentence for sentence in profile.partial)


def test_the_wait_is_told_by_littles_law_where_no_histogram_tells_it() -> None:
    """Three wait at every reading and 20 a second come: each waits 150 ms."""

    def page(served: Served) -> str:
        served.waiting = 3
        return sglang_page(served)

    profile, new = watched(page)
    assert profile.queueing.wait is None
    assert profile.queueing.wait_share == pytest.approx(0.15 / np.mean(new.ttft), rel=0.02)
    ttft = profile.breakdown("ttft")
    assert ttft is not None
    assert ttft.parts["queue"] == pytest.approx(profile.queueing.wait_share)
    assert sum(ttft.parts.values()) == pytest.approx(1.0)


def test_tgis_first_token_is_a_wait_and_a_prefill() -> None:
    profile, new = watched(tgi_page)
    ttft = profile.breakdown("ttft")
    assert ttft is not None
    assert ttft.seconds == pytest.approx(np.mean(new.ttft))
    assert ttft.parts["queue"] == pytest.approx(np.mean(new.queue) / np.mean(new.ttft))


def test_requests_that_failed_are_no_successes() -> None:
    served = Served()
    first = vllm_page(served)
    traffic(served, 30)
    served.aborted = 10
    scrapes = tuple(
        parse_metrics(t, 5.0 * i, URL) for i, t in enumerate((first, vllm_page(served)))
    )
    profile = profile_of(Sampled(URL, dialect_of(scrapes[0], URL), scrapes, ()))
    assert (profile.traffic.completed, profile.traffic.failed) == (30, 10)
    assert profile.metrics is not None
    assert profile.metrics["error_rate"] == 0.25


def test_a_limit_within_a_bucket_is_said_to_be_undecided() -> None:
    """TTFT lies in (100, 250] ms or above; 200 ms falls between, 10 s does not."""
    profile, _ = watched(vllm_page, slo="p50(ttft)<200ms,p95(e2e)<9s")
    told = [note for note in profile.notes if "cannot decide" in note]
    assert len(told) == 1
    assert "p50(ttft)<200ms" in told[0]
    assert "100 ms and 250 ms" in told[0]
    assert profile.slo == "p50(ttft)<200ms,p95(e2e)<9s"


def test_a_quantile_beyond_the_last_bucket_is_told_as_a_lower_bound() -> None:
    served = Served()
    first = vllm_page(served)
    for _ in range(40):
        served.serve(ttft=30.0, tpot=0.01, inputs=10, outputs=2)
    scrapes = tuple(
        parse_metrics(t, 9.0 * i, URL) for i, t in enumerate((first, vllm_page(served)))
    )
    sampled = Sampled(URL, dialect_of(scrapes[0], URL), scrapes, ())
    profile = profile_of(sampled, slo=parse_slo("ttft<1s"))
    assert profile.metrics is not None
    assert profile.metrics["ttft"]["p95"] == 10.0
    assert profile.metrics["ttft"]["intervals"]["p95"] is None
    assert any("above 10000 ms" in note for note in profile.notes)


@pytest.mark.parametrize(("growing", "stable"), [(True, False), (False, True)])
def test_a_queue_that_grows_is_told_from_one_that_does_not(growing: bool, stable: bool) -> None:
    served = Served(running=8)
    scrapes = []
    rng = random.Random(3)
    for second in range(30):
        traffic(served, 10, seed=second)
        served.waiting = rng.randrange(4) + (5 * second if growing else 0)
        scrapes.append(parse_metrics(vllm_page(served), float(second), URL))
    sampled = Sampled(URL, dialect_of(scrapes[0], URL), tuple(scrapes), ())
    queueing = profile_of(sampled).queueing
    assert queueing.stable is stable
    if growing:
        assert queueing.growth_per_s == pytest.approx(5, rel=0.1)
        # 15 a second came, 10 a second went.
        assert queueing.utilisation == pytest.approx(1.5, rel=0.1)
    else:
        assert queueing.utilisation is None


def gauged(running: list[float], waiting: list[float]) -> Profile:
    """A server with these gauges, a reading a second."""
    served, scrapes = Served(), []
    for second, (runs, waits) in enumerate(zip(running, waiting, strict=True)):
        traffic(served, 5, seed=second)
        served.running, served.waiting = runs, waits
        scrapes.append(parse_metrics(vllm_page(served), float(second), URL))
    return profile_of(Sampled(URL, dialect_of(scrapes[0], URL), tuple(scrapes), ()))


def test_a_batch_that_fills_while_nobody_waits_is_no_growing_queue() -> None:
    queueing = gauged([4.0 * second for second in range(20)], [0.0] * 20).queueing
    assert queueing.growth_per_s == pytest.approx(4.0)
    assert queueing.stable is True
    assert queueing.utilisation is None


@pytest.mark.parametrize("seed", range(10))
def test_a_queue_that_only_varies_is_stable(seed: int) -> None:
    rng = random.Random(seed)
    queueing = gauged([8.0] * 20, [float(rng.randrange(1, 40)) for _ in range(20)]).queueing
    assert queueing.stable is True


def test_too_few_requests_are_said_and_give_no_quantile() -> None:
    served = Served()
    first = vllm_page(served)
    traffic(served, 7)
    scrapes = tuple(
        parse_metrics(t, 5.0 * i, URL) for i, t in enumerate((first, vllm_page(served)))
    )
    profile = profile_of(Sampled(URL, dialect_of(scrapes[0], URL), scrapes, ()))
    assert profile.metrics is not None
    assert profile.metrics["ttft"]["p95"] is None
    assert profile.metrics["completed"] == 7
    assert any("needs at least 20 requests; has 7" in s for s in profile.partial)


def test_a_live_server_is_watched_over_the_window() -> None:
    served, lock = Served(running=1), threading.Lock()

    def answer(path: str) -> str:
        assert path == "/metrics"
        with lock:
            traffic(served, 20, seed=len(served.e2e))
            return vllm_page(served)

    said: list[str] = []
    with endpoint(answer) as url:
        profile = sample_metrics(url, 0.3, say=said.append)
    assert profile.source.where == f"{url}/metrics"
    assert profile.source.window_s is not None
    assert 0.2 < profile.source.window_s < 5.0
    # The first reading's twenty came before the window.
    assert profile.traffic.completed == len(served.e2e) - 20
    assert profile.traffic.completed >= 20
    assert said
    assert "vLLM" in said[0]
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_no_traffic_leaves_a_profile_that_says_so() -> None:
    with endpoint(lambda _: vllm_page(Served())) as url:
        profile = sample_metrics(url, 0.1)
    assert profile.traffic.requests == 0
    assert any(s.startswith("no traffic") for s in profile.partial)


def test_a_server_that_dies_in_the_middle_leaves_what_was_seen() -> None:
    served, calls = Served(), []

    def answer(path: str) -> str | Answer:
        calls.append(path)
        if len(calls) > 4:
            return 503, {}, b"gone"
        traffic(served, 30, seed=len(calls))
        return vllm_page(served)

    with endpoint(answer) as url:
        profile = sample_metrics(url, 5.0)
    assert profile.traffic.completed == 90
    assert any("stopped answering" in s and "503" in s for s in profile.partial)


def test_a_server_that_restarts_is_told_and_counted_from_zero() -> None:
    served = [Served()]
    traffic(served[0], 50)
    calls = []

    def answer(path: str) -> str:
        calls.append(path)
        if len(calls) == 3:
            served[0] = Served()
        traffic(served[0], 10, seed=len(calls))
        return vllm_page(served[0])

    with endpoint(answer) as url:
        profile = sample_metrics(url, 0.8)
    assert any("began again 1 times" in s for s in profile.partial)
    assert profile.traffic.completed == 10 * (len(calls) - 1)


def test_stopping_keeps_what_was_seen() -> None:
    stop = threading.Event()
    served = Served()

    def answer(_: str) -> str:
        traffic(served, 30, seed=len(served.e2e))
        if len(served.e2e) >= 90:
            stop.set()
        return vllm_page(served)

    with endpoint(answer) as url:
        profile = sample_metrics(url, 20.0, stop=stop)
    assert profile.traffic.completed >= 60
    assert any("interrupted" in s for s in profile.partial)


def test_nobody_listening_is_the_environments_lack() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(EnvironmentMissing, match="cannot be reached: Connection refused"):
        sample_metrics(f"http://127.0.0.1:{port}", 1.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<!doctype html><html><body>hello</body></html>", "a web page"),
        ('{"error": "not found"}', "another format"),
        ("", "no metrics at all"),
        ("# TYPE other:tokens counter\nother:tokens 3\n", "it has other:tokens"),
        ("# TYPE python_gc counter\npython_gc_total 3\n", "only figures of its process"),
    ],
)
def test_what_is_no_known_metrics_page_is_refused(body: str, message: str) -> None:
    with endpoint(lambda _: body) as url, pytest.raises(BadInput, match=message):
        sample_metrics(url, 1.0)


def test_a_missing_path_is_refused_with_a_hint() -> None:
    with (
        endpoint(lambda _: (404, {}, b"no")) as url,
        pytest.raises(BadInput, match=r"404.*/metrics"),
    ):
        sample_metrics(f"{url}/other", 1.0)


def test_a_redirect_within_the_host_is_followed_and_to_another_is_not() -> None:
    def answer(path: str) -> str | Answer:
        if path == "/metrics":
            return 307, {"Location": "/metrics/"}, b""
        return vllm_page(Served())

    with endpoint(answer) as url:
        assert sample_metrics(url, 0.1).source.server == "vllm"
    away = (302, {"Location": "http://169.254.169.254/metrics"}, b"")
    with endpoint(lambda _: away) as url, pytest.raises(BadInput, match="another host"):
        sample_metrics(url, 1.0)


def test_a_page_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_scrape, "LARGEST_BYTES", 1 << 20)
    with (
        endpoint(lambda _: "# " + "x" * (2 << 20)) as url,
        pytest.raises(BadInput, match="more than 1 MiB"),
    ):
        sample_metrics(url, 1.0)


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prometheus_scrape.scrape.__kwdefaults__, "timeout_s", 0.1)

    def answer(_: str) -> str:
        time.sleep(0.5)
        return ""

    with endpoint(answer) as url, pytest.raises(EnvironmentMissing, match=r"within 0\.1 s"):
        sample_metrics(url, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("localhost:8000", "write http"),
        ("file:///etc/passwd", "write http"),
        ("ftp://host/metrics", "write http"),
        ("http://[::1/metrics", "not the address"),
        ("http://", "names no host"),
        ("http://host:port/metrics", "not the address"),
        ("http://me:secret@host/metrics", "user and password"),
    ],
)
def test_what_is_no_address_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        metrics_url(text)
    assert "secret" not in str(error.value)


def test_a_servers_address_gets_the_usual_path() -> None:
    assert metrics_url(" http://host:8000 ") == "http://host:8000/metrics"
    assert metrics_url("https://host/") == "https://host/metrics"
    assert metrics_url("http://host/other?x=1#top") == "http://host/other?x=1"


def test_a_window_of_no_length_is_refused() -> None:
    with pytest.raises(BadInput, match="too short"):
        sample_metrics("http://host", 0.0)
