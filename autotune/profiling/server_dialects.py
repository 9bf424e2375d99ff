"""What each serving engine calls the quantities that a profile is made of.

Names are those of the public documentation: vLLM "Production Metrics" (of the releases 0.5 to
0.32), SGLang "Production Metrics", text-generation-inference "Metrics", llama.cpp's server (its
README). Where releases differ, the newest name stands first. Counters stand without `_total`, as
`Scrape` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autotune.errors import BadInput
from autotune.profiling.prometheus_scrape import Scrape

ServerName = Literal["vllm", "sglang", "tgi", "llamacpp"]
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One server's names. An empty tuple: the server does not tell. `hints` go into the profile.

    Counters: tokens of prompts and answers, requests that arrived, finished and failed (finished
    ones that are no success carry the label and values of `failure_label`), preemptions, prompt
    tokens asked of the prefix cache and found there, speculated tokens. Gauges: requests running
    and waiting, share of the KV cache in use, its slots in tokens. Histograms, in seconds: TTFT,
    `tpot` of each request, `gap` of each token, E2E, and parts of a request's time; in tokens: the
    lengths, and `step_tokens` of a step. `step` and `forward` are seconds of steps by the label
    `method`, which is prefill or decode.
    """

    name: ServerName
    title: str
    prefix: str
    prompt_tokens: Names
    output_tokens: Names
    finished: Names
    running: Names
    waiting: Names
    arrived: Names = ()
    failed: Names = ()
    failure_label: tuple[str, tuple[str, ...]] | None = None
    preemptions: Names = ()
    cache_queries: Names = ()
    cache_hits: Names = ()
    drafts: Names = ()
    accepted: Names = ()
    occupancy: Names = ()
    cache_tokens: Names = ()
    cache_info: Names = ()
    ttft: Names = ()
    tpot: Names = ()
    gap: Names = ()
    e2e: Names = ()
    queue: Names = ()
    prefill: Names = ()
    input_lengths: Names = ()
    output_lengths: Names = ()
    step_tokens: Names = ()
    step: Names = ()
    forward: Names = ()
    hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def counters(self) -> Names:
        """All names of counters, which fall only when the server begins again."""
        return (
            *self.prompt_tokens,
            *self.output_tokens,
            *self.finished,
            *self.arrived,
            *self.failed,
            *self.preemptions,
        )


VLLM = Dialect(
    name="vllm",
    title="vLLM",
    prefix="vllm:",
    prompt_tokens=("vllm:prompt_tokens",),
    output_tokens=("vllm:generation_tokens",),
    finished=("vllm:request_success",),
    failure_label=("finished_reason", ("abort", "error")),
    running=("vllm:num_requests_running",),
    waiting=("vllm:num_requests_waiting",),
    preemptions=("vllm:num_preemptions",),
    cache_queries=("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
    cache_hits=("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
    drafts=("vllm:spec_decode_num_drafts",),
    accepted=("vllm:spec_decode_num_accepted_tokens",),
    occupancy=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    cache_info=("vllm:cache_config_info",),
    ttft=("vllm:time_to_first_token_seconds",),
    tpot=("vllm:request_time_per_output_token_seconds",),
    gap=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    e2e=("vllm:e2e_request_latency_seconds",),
    queue=("vllm:request_queue_time_seconds", "vllm:time_in_queue_requests"),
    prefill=("vllm:request_prefill_time_seconds",),
    input_lengths=("vllm:request_prompt_tokens",),
    output_lengths=("vllm:request_generation_tokens",),
    # A histogram in spite of its name.
    step_tokens=("vllm:iteration_tokens_total",),
)

SGLANG = Dialect(
    name="sglang",
    title="SGLang",
    prefix="sglang:",
    prompt_tokens=("sglang:prompt_tokens",),
    output_tokens=("sglang:generation_tokens",),
    finished=("sglang:num_requests", "sglang:e2e_request_latency_seconds_count"),
    failed=("sglang:num_aborted_requests",),
    running=("sglang:num_running_reqs",),
    waiting=("sglang:num_queue_reqs",),
    # The gauge num_retracted_reqs tells only of the last batch.
    preemptions=("sglang:num_retracted_requests", "sglang:num_retractions_sum"),
    cache_queries=("sglang:prompt_tokens",),
    cache_hits=("sglang:cached_tokens",),
    occupancy=("sglang:token_usage",),
    cache_tokens=("sglang:max_total_num_tokens",),
    ttft=("sglang:time_to_first_token_seconds",),
    tpot=("sglang:request_time_per_output_token_seconds", "sglang:time_per_output_token_seconds"),
    gap=("sglang:inter_token_latency_seconds",),
    e2e=("sglang:e2e_request_latency_seconds",),
    queue=("sglang:queue_time_seconds",),
    input_lengths=("sglang:prompt_tokens_histogram",),
    output_lengths=("sglang:generation_tokens_histogram",),
    hints={
        "input_tokens": "start SGLang with --collect-tokens-histogram for the lengths of requests"
    },
)

TGI = Dialect(
    name="tgi",
    title="text-generation-inference",
    prefix="tgi_",
    prompt_tokens=("tgi_request_input_length_sum",),
    output_tokens=("tgi_request_generated_tokens_sum",),
    finished=("tgi_request_success",),
    arrived=("tgi_request_count",),
    failed=("tgi_request_failure",),
    running=("tgi_batch_current_size",),
    waiting=("tgi_queue_size",),
    tpot=("tgi_request_mean_time_per_token_duration",),
    e2e=("tgi_request_duration",),
    queue=("tgi_request_queue_duration",),
    input_lengths=("tgi_request_input_length",),
    output_lengths=("tgi_request_generated_tokens",),
    step=("tgi_batch_inference_duration",),
    forward=("tgi_batch_forward_duration",),
    hints={
        "tpot": "text-generation-inference divides a request's whole time in the model by its "
        "tokens, so that its TPOT holds the time of the prompt too",
    },
)

# It counts tokens and tells who runs and waits; of single requests it tells nothing.
LLAMACPP = Dialect(
    name="llamacpp",
    title="llama.cpp",
    prefix="llamacpp:",
    prompt_tokens=("llamacpp:prompt_tokens",),
    output_tokens=("llamacpp:tokens_predicted",),
    finished=(),
    running=("llamacpp:requests_processing",),
    waiting=("llamacpp:requests_deferred",),
    occupancy=("llamacpp:kv_cache_usage_ratio",),
)

DIALECTS: tuple[Dialect, ...] = (VLLM, SGLANG, TGI, LLAMACPP)


def dialect_of(scrape: Scrape, url: str) -> Dialect:
    """The dialect that a page speaks.

    Raises:
        BadInput: it speaks none that is known here.
    """
    counts = {d.name: sum(name.startswith(d.prefix) for name in scrape.series) for d in DIALECTS}
    best = max(DIALECTS, key=lambda dialect: counts[dialect.name])
    if counts[best.name] == 0:
        names = sorted(n for n in scrape.series if not n.startswith(("python_", "process_")))
        seen = ", ".join(names[:3]) or "only figures of its process"
        raise BadInput(
            f"{url} speaks none of the dialects that are read here, which are vLLM (vllm:…), "
            f"SGLang (sglang:…), text-generation-inference (tgi_…) and llama.cpp (llamacpp:…); it "
            f"has {seen}"
        )
    return best
