"""What `/metrics` tells of requests that were served, by vLLM's names."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.server.fake_served import (
    ask,
    completion,
    gated_engine,
    head,
    serving,
    until_idle,
)


def test_metrics_tell_what_was_served() -> None:
    async def main() -> None:
        engine, _ = gated_engine()
        async with serving(engine) as (port, served, _server):
            prompt = list(range(20))
            for _ in range(3):
                assert (await ask(port, completion(prompt, max_tokens=7)))[0] == 200
            await until_idle(served)
            _, headers, body = await ask(port, head("/metrics", "connection: close", method="GET"))
            assert headers["content-type"].startswith("text/plain")
            families = {f.name: f for f in text_string_to_metric_families(body.decode())}

            def value(name: str, **labels: str) -> float:
                found = [
                    sample
                    for family in families.values()
                    for sample in family.samples
                    if sample.name == name and labels.items() <= sample.labels.items()
                ]
                assert len(found) == 1, (name, found)
                assert found[0].labels["model_name"] == "fake" or name.startswith("process_")
                return float(found[0].value)

            assert value("vllm:prompt_tokens_total") == 60
            assert value("vllm:generation_tokens_total") == 21
            assert value("vllm:prefix_cache_queries_total") == 60
            assert value("vllm:prefix_cache_hits_total") == 2 * 16  # two full blocks, twice
            assert value("vllm:request_success_total", finished_reason="length") == 3
            assert value("vllm:request_success_total", finished_reason="abort") == 0
            assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
            assert value("vllm:kv_cache_usage_perc") == 0
            assert value("vllm:cache_config_info", block_size="8", num_gpu_blocks="64") == 1
            for name, count in (
                ("time_to_first_token_seconds", 3),
                ("inter_token_latency_seconds", 18),
                ("request_time_per_output_token_seconds", 3),
                ("e2e_request_latency_seconds", 3),
                ("request_queue_time_seconds", 3),
                ("request_prefill_time_seconds", 3),
                ("request_decode_time_seconds", 3),
                ("request_generation_tokens", 3),
            ):
                assert value(f"vllm:{name}_count") == count
                assert value(f"vllm:{name}_bucket", le="+Inf") == count
            assert value("vllm:request_prompt_tokens_sum") == 60
            assert value("vllm:request_prompt_tokens_bucket", le="20.0") == 3
            assert value("vllm:request_prompt_tokens_bucket", le="10.0") == 0
            # 20 tokens of prompt and one sampled, twice 4 left of the prompt and one, and decodes.
            assert value("vllm:iteration_tokens_total_sum") == 21 + 2 * 5 + 3 * 6
            whole = value("vllm:e2e_request_latency_seconds_sum")
            parts = ("request_queue_time", "request_inference_time")
            assert whole == pytest.approx(sum(value(f"vllm:{part}_seconds_sum") for part in parts))

    asyncio.run(main())
