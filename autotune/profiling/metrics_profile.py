"""A profile from a running server's metrics: what vLLM, SGLang or TGI tell of themselves.

Much less is known than of the bundled engine: no request's own times, no step's own work. What the
server does not tell is None. Latencies come from histograms, so that a quantile is known no better
than its bucket; `metrics` holds the interpolated value, with the bucket as its interval.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np

from autotune.profiling.enough import LEAST_REQUESTS, lacking
from autotune.profiling.metrics_latency import bench_metrics, undecided_limits
from autotune.profiling.metrics_queue import queueing_of, series_of
from autotune.profiling.metrics_sampling import Sampled, sample_endpoint
from autotune.profiling.metrics_seen import Seen, first_token_s, mean_wait_s, spread_of
from autotune.profiling.metrics_window import Histogram, Window
from autotune.profiling.schema import (
    Breakdown,
    KvCache,
    ModelFacts,
    Phase,
    PhaseName,
    Profile,
    Source,
    Spread,
    Traffic,
)
from autotune.profiling.server_dialects import Dialect
from autotune.records import utc_now
from autotune.slo import Slo


def sample_metrics(
    url: str,
    window_s: float,
    *,
    model: ModelFacts | None = None,
    slo: Slo | None = None,
    price: float | None = None,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Profile:
    """Watch a server's `/metrics` over a window, and profile what it did meanwhile.

    A server that goes away, restarts or gets no traffic leaves a profile that says so in `partial`.

    Arguments:
        url: the server, or its /metrics; vLLM, SGLang or text-generation-inference.
        window_s: seconds to watch.
        model: what it serves, for bytes and operations.
        slo: limits; the profile says which of them the server's buckets cannot decide.
        price: of an hour of the server.
        say: told what is going on.
        stop: set it to end early and keep what was seen.

    Raises:
        BadInput: no address, no metrics page, or a dialect that is not known here.
        EnvironmentMissing: the server cannot be reached.
    """
    sampled = sample_endpoint(url, window_s, say=say, stop=stop)
    return profile_of(sampled, model=model, slo=slo, price=price)


def profile_of(
    sampled: Sampled,
    *,
    model: ModelFacts | None = None,
    slo: Slo | None = None,
    price: float | None = None,
) -> Profile:
    """The profile of a window that was sampled."""
    dialect = sampled.dialect
    window = Window(sampled.scrapes, dialect.counters)
    seen = Seen(window, dialect)
    notes, partial = _hints(window, dialect), list(sampled.problems)
    if window.resets:
        partial.append(
            f"the server began again {window.resets} times within the window (its counters fell): "
            "what it did between a reading and its end is lost"
        )
    if not seen.output_tokens and not seen.finished:
        partial.append(
            f"no traffic: no token was generated and no request finished within "
            f"{window.seconds:.1f} s; send the load while sampling, or take a longer window"
        )
    elif seen.finished < LEAST_REQUESTS:
        partial.append(lacking("a latency", "requests", LEAST_REQUESTS, seen.finished))
    partial.append(_untold(dialect))
    metrics = bench_metrics(seen, slo)
    notes += undecided_limits(seen, slo)
    if seen.tpot_from_gaps:
        notes.append(
            "the server tells the gaps between tokens and not each request's TPOT: the mean is the "
            "same by tokens, the percentiles are of single gaps and lie further out"
        )
    if drafts := window.increase(dialect.drafts):
        accepted = window.increase(dialect.accepted) or 0.0
        notes.append(
            f"the server speculates: {accepted / drafts:.2f} accepted tokens a draft in the window"
        )
    input_tokens, output_tokens = seen.lengths()
    breakdowns = _breakdowns(seen, model, input_tokens)
    if breakdowns and seen.enough(dialect.queue) is None:
        notes.append("the mean wait is that of Little's law: requests waiting over arrivals")
    if breakdowns:
        notes.append(
            "the server does not tell how long a prompt shares its steps with the work of others; "
            "of the time to the first token, all but the waiting counts as the prompt's own"
        )
    return Profile(
        created_at=utc_now(),
        source=Source(
            kind="metrics", where=sampled.url, server=dialect.name, window_s=window.seconds
        ),
        slo=str(slo) if slo else None,
        price=price,
        model=model,
        traffic=_traffic(seen, input_tokens, output_tokens),
        metrics=metrics,
        phases=_phases(seen),
        kv=_kv_cache(seen, model, input_tokens, output_tokens),
        queueing=queueing_of(seen),
        breakdowns=breakdowns,
        series=series_of(window, dialect),
        partial=partial,
        notes=notes,
    )


def _hints(window: Window, dialect: Dialect) -> list[str]:
    """What the reader of this server's figures should know, as far as it applies."""
    told = window.histogram(dialect.input_lengths) is not None
    return [text for about, text in dialect.hints.items() if about != "input_tokens" or not told]


def _traffic(seen: Seen, inputs: Spread | None, outputs: Spread | None) -> Traffic:
    seconds = seen.window.seconds
    counts = np.asarray(_arrivals(seen))
    enough = counts.size >= LEAST_REQUESTS and counts.sum() >= LEAST_REQUESTS
    tokens = seen.prompt_tokens, seen.output_tokens
    ratio = tokens[0] / tokens[1] if tokens[0] is not None and tokens[1] else None
    if inputs and outputs:
        ratio = inputs.mean / outputs.mean if outputs.mean else None
    return Traffic(
        requests=seen.arrived,
        completed=seen.finished,
        refused=0,
        failed=seen.failed,
        timed_out=0,
        duration_s=seconds,
        rate=seen.arrived / seconds if seconds else None,
        input_tokens=inputs,
        output_tokens=outputs,
        dispersion=float(counts.var(ddof=1) / counts.mean()) if enough else None,
        dispersion_window_s=seconds / counts.size if enough else None,
        prompt_output_ratio=ratio,
    )


def _arrivals(seen: Seen) -> list[float]:
    """Requests that came between one scrape and the next."""
    scrapes = seen.window.scrapes
    pairs = itertools.pairwise(scrapes)
    return [float(Seen(Window(pair), seen.dialect).arrived) for pair in pairs]


def _untold(dialect: Dialect) -> str:
    """What this server's metrics cannot answer, said once."""
    parts = ["what single steps do"]
    if not dialect.occupancy:
        parts.append("how full the KV cache is")
    if not dialect.ttft:
        parts.append("the time to the first token")
    return f"{dialect.title}'s metrics do not tell {' nor '.join(parts)}"


def _kv_cache(
    seen: Seen, model: ModelFacts | None, inputs: Spread | None, outputs: Spread | None
) -> KvCache:
    window, dialect = seen.window, seen.dialect
    usage = [window.gauge(dialect.occupancy, s, mean=True) for s in window.scrapes]
    known = [value for value in usage if value is not None]
    block_size, slots = _slots(window, dialect)
    per_request = inputs.mean + outputs.mean if inputs and outputs else None
    return KvCache(
        blocks_total=round(slots / block_size) if slots and block_size else None,
        block_size=block_size,
        total_bytes=slots * model.kv_bytes_per_token if slots and model else None,
        occupancy_mean=sum(known) / len(known) if known else None,
        occupancy_peak=max(known, default=None),
        preemptions=seen.preemptions,
        hit_rate=seen.hit_rate,
        seats=slots / per_request if slots and per_request else None,
    )


def _slots(window: Window, dialect: Dialect) -> tuple[int | None, float | None]:
    """(tokens of a block, tokens that the cache holds over all engines)."""
    total = window.gauge(dialect.cache_tokens, window.scrapes[-1])
    sizes: list[tuple[int, int]] = []
    for labels in window.labels(dialect.cache_info):
        values = labels.get("block_size", ""), labels.get("num_gpu_blocks", "")
        if all(value.isdecimal() and int(value) > 0 for value in values):
            sizes.append((int(values[0]), int(values[1])))
    if sizes:
        return sizes[0][0], float(sum(size * number for size, number in sizes))
    return None, total


def _phases(seen: Seen) -> list[Phase]:
    """Prefills and decodes of a server that tells the time of its steps by kind."""
    times: dict[PhaseName, tuple[Histogram, float | None]] = {}
    for name in ("prefill", "decode"):

        def of_kind(labels: dict[str, str], kind: str = name) -> bool:
            return labels.get("method") == kind

        steps = seen.window.histogram(seen.dialect.step, of_kind)
        forward = seen.window.histogram(seen.dialect.forward, of_kind)
        if steps and steps.count:
            times["prefill" if name == "prefill" else "decode"] = (
                steps,
                min(forward.total, steps.total) if forward and forward.count else None,
            )
    whole = sum(steps.total for steps, _ in times.values())
    phases = []
    for kind, (steps, device_seconds) in times.items():
        # A prefill yields a request's first token.
        first = min(seen.arrived, round(seen.output_tokens or 0))
        sampled = first if kind == "prefill" else round(seen.output_tokens or 0) - first
        spread = spread_of(steps)
        if spread is None or not whole:
            continue
        device = steps.total if device_seconds is None else device_seconds
        phases.append(
            Phase(
                name=kind,
                steps=steps.count,
                seconds=steps.total,
                share=steps.total / whole,
                device_seconds=device,
                host_seconds=steps.total - device,
                tokens=round(seen.prompt_tokens or 0) if kind == "prefill" else sampled,
                sampled=sampled,
                mean_batch=sampled / steps.count,
                step_p50=spread.p50,
                step_p95=spread.p95,
            )
        )
    return phases


def _breakdowns(seen: Seen, model: ModelFacts | None, inputs: Spread | None) -> list[Breakdown]:
    """TTFT as waiting and prompt, where the server tells both."""
    first, wait = first_token_s(seen), mean_wait_s(seen)
    if not first or wait is None:
        return []
    waited = min(1.0, wait / first)
    computed = 1.0 - waited
    prefill = seen.enough(seen.dialect.prefill)
    if prefill is not None:
        computed = min(computed, (prefill.mean or 0.0) / first)
    attention = 0.0
    if model is not None and inputs is not None:
        # Operations of a prompt: 2 a parameter and token, 4 a feature and pair of tokens.
        linear = 2.0 * model.matmul_parameters * inputs.mean
        pairs = 4.0 * model.attention_features * inputs.mean * (inputs.mean + 1) / 2
        attention = computed * pairs / (linear + pairs)
    parts = {
        "queue": waited,
        "prefill_linear": computed - attention,
        "prefill_attention": attention,
        "other": max(0.0, 1.0 - waited - computed),
    }
    return [Breakdown(metric="ttft", seconds=first, parts=parts)]
