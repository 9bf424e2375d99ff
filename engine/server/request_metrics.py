"""What a server counts of its requests, by vLLM's definitions; seconds and tokens.

Written by hand, since it is done for every token: `prometheus_client` takes several times as long
to observe a value. `engine.server.metrics_endpoint` makes Prometheus' text of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from engine.request import FinishReason, Request
from engine.step_record import StepRecord

# vLLM's bounds, and some between them: limits of an SLO should be bounds, so that the histogram
# tells the share of requests within them.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
PHASE_S = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = tuple(float(1 << power) for power in (0, *range(3, 15)))
LENGTHS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
COUNTS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


class Histogram:
    """Observations counted by upper bounds, which are inclusive, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class RequestMetrics:
    """Counters and histograms of a server.

    `on_step` is called from the engine's thread, everything else from the event loop's. Each
    figure is written by one of them alone.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.gap = Histogram(GAP_S)
        self.per_token = Histogram(GAP_S)
        self.whole = Histogram(PHASE_S)
        self.queue = Histogram(PHASE_S)
        self.prefill = Histogram(PHASE_S)
        self.decode = Histogram(PHASE_S)
        self.inference = Histogram(PHASE_S)
        self.input_tokens = Histogram(LENGTHS)
        self.output_tokens = Histogram(LENGTHS)
        self.asked_tokens = Histogram(LENGTHS)
        self.request_preemptions = Histogram(COUNTS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.finished: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.step_tokens = Histogram(STEP_TOKENS)
        self.steps = 0
        self.preemptions = 0
        self.drafts = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.accepted_by_depth: list[int] = []

    def on_step(self, step: StepRecord) -> None:
        """Count a step."""
        self.steps += 1
        tokens = step.prefill_tokens + step.sampled_sequences + step.accepted_tokens
        self.step_tokens.observe(tokens)
        self.preemptions += step.preemptions
        if step.drafted_by_depth:
            self.drafts += step.drafted_by_depth[0]
            self.drafted_tokens += step.drafted_tokens
            self.accepted_tokens += step.accepted_tokens
            by_depth = self.accepted_by_depth
            while len(by_depth) < len(step.accepted_by_depth):
                by_depth.append(0)
            for depth, accepted in enumerate(step.accepted_by_depth):
                by_depth[depth] += accepted

    def on_tokens(self, request: Request, now: float, last_at: float | None, tokens: int) -> None:
        """Count new tokens of a request: `last_at` is when it got some before, on its clock."""
        self.generated_tokens += tokens
        if last_at is not None:
            self.gap.observe(now - last_at)
            return
        self.first_token.observe(now - request.arrival)
        self.prompt_tokens += request.num_prompt_tokens
        self.cached_tokens += request.num_cached_tokens

    def on_leave(
        self, request: Request, now: float, first_at: float | None, last_at: float | None
    ) -> None:
        """Count a request that left; it got its first and last tokens at these times, if any."""
        reason = request.finish_reason
        if reason is FinishReason.REFUSED:
            self.rejected["refused"] += 1
            return
        given_up = reason is FinishReason.ABORT and request.refusal is not None
        self.finished["error" if given_up else str(reason)] += 1
        outputs = request.num_output_tokens
        self.whole.observe(now - request.arrival)
        self.input_tokens.observe(request.num_prompt_tokens)
        self.output_tokens.observe(outputs)
        self.asked_tokens.observe(request.max_total_tokens - request.num_prompt_tokens)
        self.request_preemptions.observe(request.num_preemptions)
        began = request.first_scheduled
        if began is None:
            return
        self.queue.observe(began - request.arrival)
        if first_at is None or last_at is None:
            return
        self.prefill.observe(first_at - began)
        self.decode.observe(last_at - first_at)
        self.inference.observe(last_at - began)
        if outputs > 1:
            self.per_token.observe((last_at - first_at) / (outputs - 1))
