"""Pages as vLLM, SGLang and TGI write them, from what a server has served so far."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass
class Served:
    """What a server did since it began; times in seconds, lengths in tokens."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    aborted: int = 0
    preemptions: int = 0
    cached: int = 0
    running: float = 0
    waiting: float = 0
    usage: float = 0.25

    def serve(
        self, ttft: float, tpot: float, inputs: int, outputs: int, queue: float = 0.0
    ) -> None:
        """One more request, from its arrival to its end."""
        self.ttft.append(ttft)
        self.tpot.append(tpot)
        self.gaps.extend([tpot] * (outputs - 1))
        self.e2e.append(ttft + tpot * (outputs - 1))
        self.queue.append(queue)
        self.inputs.append(inputs)
        self.outputs.append(outputs)


def histogram(name: str, values: Sequence[float], bounds: Sequence[float], labels: str = "") -> str:
    lines = [f"# HELP {name} Of the test.", f"# TYPE {name} histogram"]
    comma = "," if labels else ""
    for bound in bounds:
        count = sum(value <= bound for value in values)
        lines.append(f'{name}_bucket{{{labels}{comma}le="{float(bound)}"}} {float(count)}')
    lines.append(f'{name}_bucket{{{labels}{comma}le="+Inf"}} {float(len(values))}')
    braces = f"{{{labels}}}" if labels else ""
    lines.append(f"{name}_count{braces} {float(len(values))}")
    lines.append(f"{name}_sum{braces} {float(sum(values))!r}")
    return "\n".join(lines) + "\n"


def single(name: str, kind: str, value: float, labels: str = "") -> str:
    braces = f"{{{labels}}}" if labels else ""
    return f"# HELP {name} Of the test.\n# TYPE {name} {kind}\n{name}{braces} {float(value)!r}\n"


def vllm_page(s: Served, *, old: bool = False, labels: str = 'engine="0",model_name="m"') -> str:
    """The names of release 0.32, or of the releases about 0.6 (`old`)."""
    usage = "vllm:gpu_cache_usage_perc" if old else "vllm:kv_cache_usage_perc"
    gap = "vllm:time_per_output_token_seconds" if old else "vllm:inter_token_latency_seconds"
    page = single("python_info", "gauge", 1, 'version="3.12"')
    page += single("vllm:num_requests_running", "gauge", s.running, labels)
    page += single("vllm:num_requests_waiting", "gauge", s.waiting, labels)
    page += single(usage, "gauge", s.usage, labels)
    page += single("vllm:num_preemptions_total", "counter", s.preemptions, labels)
    page += single("vllm:prompt_tokens_total", "counter", sum(s.inputs), labels)
    page += single("vllm:generation_tokens_total", "counter", sum(s.outputs), labels)
    page += "# HELP vllm:request_success_total Of the test.\n"
    page += "# TYPE vllm:request_success_total counter\n"
    for reason, count in (("stop", len(s.e2e)), ("length", 0), ("abort", s.aborted)):
        page += f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}.0\n'
    page += histogram("vllm:time_to_first_token_seconds", s.ttft, SECONDS, labels)
    page += histogram(gap, s.gaps, SECONDS, labels)
    page += histogram("vllm:e2e_request_latency_seconds", s.e2e, SECONDS, labels)
    page += histogram("vllm:request_prompt_tokens", s.inputs, TOKENS, labels)
    page += histogram("vllm:request_generation_tokens", s.outputs, TOKENS, labels)
    page += histogram("vllm:iteration_tokens_total", s.outputs, TOKENS, labels)
    if not old:
        page += histogram("vllm:request_time_per_output_token_seconds", s.tpot, SECONDS, labels)
        page += histogram("vllm:request_queue_time_seconds", s.queue, SECONDS, labels)
        page += single("vllm:prefix_cache_queries_total", "counter", sum(s.inputs), labels)
        page += single("vllm:prefix_cache_hits_total", "counter", s.cached, labels)
        info = f'{labels},block_size="16",num_gpu_blocks="1000"'
        page += single("vllm:cache_config_info", "gauge", 1, info)
    return page


def sglang_page(s: Served, ranks: int = 1) -> str:
    labels = 'model_name="m"'
    page = single("sglang:prompt_tokens_total", "counter", sum(s.inputs), labels)
    page += single("sglang:generation_tokens_total", "counter", sum(s.outputs), labels)
    page += single("sglang:cached_tokens_total", "counter", s.cached, labels)
    page += single("sglang:num_requests_total", "counter", len(s.e2e), labels)
    page += single("sglang:num_aborted_requests_total", "counter", s.aborted, labels)
    for name, value in (
        ("num_running_reqs", s.running),
        ("num_queue_reqs", s.waiting),
        ("token_usage", s.usage),
        ("max_total_num_tokens", 16000.0),
        ("cache_hit_rate", 0.0),
        ("num_retracted_reqs", 0.0),
    ):
        page += f"# TYPE sglang:{name} gauge\n"
        for rank in range(ranks):
            page += f'sglang:{name}{{{labels},tp_rank="{rank}",pp_rank="0"}} {value}\n'
    page += single("sglang:num_retracted_requests_total", "counter", s.preemptions, labels)
    page += histogram("sglang:time_to_first_token_seconds", s.ttft, SECONDS, labels)
    page += histogram("sglang:inter_token_latency_seconds", s.gaps, SECONDS, labels)
    page += histogram("sglang:e2e_request_latency_seconds", s.e2e, SECONDS, labels)
    return page


def tgi_page(s: Served) -> str:
    """Counters without `_total`, no comments but the types."""
    page = f"# TYPE tgi_request_success counter\ntgi_request_success {len(s.e2e)}\n"
    page += f"# TYPE tgi_request_count counter\ntgi_request_count {len(s.e2e) + s.aborted}\n"
    page += "# TYPE tgi_request_failure counter\n"
    page += f'tgi_request_failure{{err="overloaded"}} {s.aborted}\n'
    page += f"# TYPE tgi_queue_size gauge\ntgi_queue_size {s.waiting}\n"
    page += f"# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size {s.running}\n"
    page += histogram("tgi_request_mean_time_per_token_duration", s.tpot, SECONDS)
    page += histogram("tgi_request_duration", s.e2e, SECONDS)
    page += histogram("tgi_request_queue_duration", s.queue, SECONDS)
    page += histogram("tgi_request_input_length", s.inputs, TOKENS)
    page += histogram("tgi_request_generated_tokens", s.outputs, TOKENS)
    prefills = [t - q for t, q in zip(s.ttft, s.queue, strict=True)]
    for name, share in (("tgi_batch_inference_duration", 1.0), ("tgi_batch_forward_duration", 0.9)):
        prefill, decode = ([share * v for v in values] for values in (prefills, s.gaps))
        page += histogram(name, prefill, SECONDS, 'method="prefill"')
        page += histogram(name, decode, SECONDS, 'method="decode"')
    return page


Answer = tuple[int, dict[str, str], bytes]


@contextlib.contextmanager
def endpoint(answer: Callable[[str], str | Answer]) -> Iterator[str]:
    """A real server on a free port; `answer` makes the body (or the whole answer) of a path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made = answer(self.path)
            status, headers, body = (
                (200, {"Content-Type": "text/plain; version=0.0.4"}, made.encode())
                if isinstance(made, str)
                else made
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
