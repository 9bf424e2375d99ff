"""`/metrics` for Prometheus, with vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.responses import Response

from engine.server.async_engine import AsyncEngine
from engine.server.request_metrics import Histogram

_REASONS = ("stop", "length", "abort", "error")


class EngineCollector(Collector):
    """Reads an engine's figures when Prometheus asks.

    Args:
        engine: the engine.
        model_name: the label `model_name` of every sample.
    """

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine
        core = engine.engine
        pool, config = core.pool, core.config
        for name, text, value in (
            ("num_requests_running", "Requests that have a seat in the batch.", engine.num_running),
            ("num_requests_waiting", "Requests that wait for a seat.", engine.num_waiting),
            (
                "kv_cache_usage_perc",
                "Share of the KV cache's blocks that requests own, from 0 to 1.",
                pool.num_used / pool.num_blocks,
            ),
        ):
            yield self._gauge(f"vllm:{name}", text, value)
        info = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(pool.num_blocks),
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "cache_dtype": config.kv_cache_dtype,
        }
        text = "The KV cache, in labels; its blocks, wherever they lie, are num_gpu_blocks."
        yield self._gauge("vllm:cache_config_info", text, 1, info)
        text = "Seconds since the last step ended while there is work; 0 without work."
        yield self._gauge("autotune:stalled_seconds", text, engine.stalled_for())

    def _counters(self) -> Iterator[Metric]:
        counted = self._engine.metrics
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts processed.", counted.prompt_tokens),
            ("generation_tokens", "Tokens generated.", counted.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up.", counted.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached.", counted.cached_tokens),
            ("prompt_tokens_cached", "Prompt tokens found cached.", counted.cached_tokens),
            ("num_preemptions", "Preemptions.", counted.preemptions),
            ("spec_decode_num_drafts", "Drafts verified.", counted.drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", counted.drafted_tokens),
            (
                "spec_decode_num_accepted_tokens",
                "Drafted tokens accepted.",
                counted.accepted_tokens,
            ),
        ):
            yield self._counter(f"vllm:{name}", text, {"": value})
        yield self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their place in the draft.",
            {str(place): count for place, count in enumerate(counted.accepted_by_depth)},
            "position",
        )
        yield self._counter(
            "vllm:request_success",
            "Requests that left, by why they ended.",
            {reason: counted.finished[reason] for reason in _REASONS},
            "finished_reason",
        )
        yield self._counter(
            "vllm:admission_rejections",
            "Requests that were not taken in, by why.",
            {"queue_full": 0, **counted.rejected},
            "reason",
        )

    def _histograms(self) -> Iterator[Metric]:
        seen = self._engine.metrics
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token.", seen.first_token),
            ("inter_token_latency_seconds", "Gaps between outputs.", seen.gap),
            ("request_time_per_output_token_seconds", "TPOT of requests.", seen.per_token),
            ("e2e_request_latency_seconds", "Time from arrival to the end.", seen.whole),
            ("request_queue_time_seconds", "Time from arrival to a seat.", seen.queue),
            ("request_inference_time_seconds", "Time in a seat.", seen.inference),
            ("request_prefill_time_seconds", "Time from a seat to the first token.", seen.prefill),
            ("request_decode_time_seconds", "Time from the first token to the last.", seen.decode),
            ("request_prompt_tokens", "Lengths of prompts.", seen.input_tokens),
            ("request_generation_tokens", "Lengths of outputs.", seen.output_tokens),
            ("request_max_num_generation_tokens", "Longest outputs asked.", seen.asked_tokens),
            ("request_num_preemptions", "Preemptions of requests.", seen.request_preemptions),
            ("iteration_tokens_total", "Tokens of steps.", seen.step_tokens),
        ):
            yield self._histogram(f"vllm:{name}", text, histogram)

    def _gauge(
        self, name: str, text: str, value: float, more: Mapping[str, str] | None = None
    ) -> Metric:
        labels = {**self._labels, **(more or {})}
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(
        self, name: str, text: str, values: Mapping[str, int], label: str | None = None
    ) -> Metric:
        names = [*self._labels] if label is None else [*self._labels, label]
        family = CounterMetricFamily(name, text, labels=names)
        for key, value in values.items():
            family.add_metric([*self._labels.values()] + ([] if label is None else [key]), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        sums = accumulate(list(histogram.counts))
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(
            list(self._labels.values()), list(zip(bounds, sums, strict=True)), histogram.total
        )
        return family


def metrics_router(engine: AsyncEngine, model_name: str) -> APIRouter:
    """The route `/metrics`."""
    router = APIRouter(tags=["server"])
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name))
    ProcessCollector(registry=registry)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def tell_metrics() -> Response:
        """Figures of the engine for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
