"""Pages of several replicas as one that Prometheus can read."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.server.replica import Replica
from engine.server.router_metrics import cache_tokens, merge_pages, router_page


def page(scale: int) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", ["engine"], registry=registry).labels("0").set(
        scale
    )
    Gauge("plain", 'Has { and "quotes".', registry=registry).set(scale)
    Counter("vllm:generation_tokens", "Tokens.", ["model"], registry=registry).labels(
        'a "b" {c},d="e" \\ \n'
    ).inc(10 * scale)
    seconds = Histogram("vllm:e2e", "Seconds.", registry=registry, buckets=(1, 2))
    for _ in range(scale):
        seconds.observe(1.5)
    Info("vllm:cache", "Cache.", registry=registry).info({"block_size": "16"})
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    names = set()
    for family in text_string_to_metric_families(text):
        assert (family.name, family.type) not in names, "a family stands twice"
        names.add((family.name, family.type))
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, "a sample stands twice"
            found[key] = sample.value
    return found


def test_every_sample_of_every_page_is_there_once_and_says_whose_it_is() -> None:
    merged = samples(merge_pages({0: page(1), 2: page(3)}))
    expected = {
        (name, tuple(sorted([*labels, ("replica", str(number))]))): value
        for number, scale in ((0, 1), (2, 3))
        for (name, labels), value in samples(page(scale)).items()
        if not name.endswith("_created")
    }
    assert {key: v for key, v in merged.items() if not key[0].endswith("_created")} == expected
    assert merged["plain", (("replica", "2"),)] == 3
    kinds = {f.name: f.type for f in text_string_to_metric_families(merge_pages({0: page(1)}))}
    assert kinds["vllm:e2e"] == "histogram"
    assert kinds["vllm:generation_tokens"] == "counter"


def test_pages_without_heads_or_of_nonsense_do_no_harm() -> None:
    assert merge_pages({}) == ""
    assert merge_pages({0: "", 1: "# EOF\n"}) == ""
    merged = merge_pages({0: "a 1\n<html>\n{} 3\na{} 2\n", 1: 'a{b="c"} 1\n'})
    assert merged == 'a{replica="0"} 1\na{replica="0"} 2\na{replica="1",b="c"} 1\n'


def test_the_routers_own_figures() -> None:
    replicas = [Replica(0), Replica(1)]
    replicas[1].restarts = 2
    found = samples(router_page(replicas))
    assert found["autotune:router_restarts_total", (("replica", "1"),)] == 2
    assert found["autotune:router_replica_up", (("replica", "0"),)] == 0


def test_the_size_of_a_cache_is_read_where_it_is_told() -> None:
    text = 'x 1\nvllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="100"} 1.0\n'
    assert cache_tokens(text) == 1600
    for other in ("", 'vllm:cache_config_info{block_size="16"} 1', text.replace("100", "None")):
        assert cache_tokens(other) is None
