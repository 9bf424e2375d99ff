"""How full the KV cache was, what that cost, and what its reuse could have been."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from autotune.profiling.enough import LEAST_REQUESTS, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import KvCache, ModelFacts
from autotune.profiling.step_columns import StepColumns
from autotune.records import RequestRecord
from engine.config import EngineConfig

# Words of the reasons by which the engine refuses what its cache or its model can never hold
# (`engine.admission.refusal_for_size`).
_FOR_SIZE = ("the KV cache holds", "leaves no room for output within max_model_len")


def kv_cache(
    evidence: LoadEvidence, steps: StepColumns, config: EngineConfig, model: ModelFacts | None
) -> tuple[KvCache, list[str]]:
    """The cache during a load, and what could not be told of it."""
    requests = evidence.requests
    partial: list[str] = []
    refused = sum(r.outcome == "refused" and _is_for_size(r.reason) for r in requests)
    if not len(steps):
        return KvCache(block_size=config.block_size, refused_for_size=refused), partial
    blocks = int(steps.blocks_total[-1])
    size = config.block_size
    started = [r for r in requests if r.first_scheduled is not None or r.output_tokens]
    asked = sum(r.input_tokens for r in started)
    attainable = None
    if evidence.prompts:
        sent = sorted(requests, key=lambda r: (r.send, r.request_id))
        attainable = attainable_hit_rate(
            [evidence.prompts[r.request_id] for r in sent if r.request_id in evidence.prompts], size
        )
    else:
        partial.append(
            "the hit rate that the trace would allow is unknown: the records hold no prompts"
        )
    if len(started) < LEAST_REQUESTS:
        partial.append(lacking("the prefix hit rate", "requests", LEAST_REQUESTS, len(started)))
    usage = np.divide(
        steps.blocks_used,
        steps.blocks_total,
        out=np.zeros(len(steps)),
        where=steps.blocks_total > 0,
    )
    preemptions = int(steps.preemptions.sum())
    return (
        KvCache(
            blocks_total=blocks,
            block_size=size,
            total_bytes=blocks * model.kv_block_bytes if model is not None else None,
            occupancy_mean=steps.over_time(usage),
            occupancy_peak=float(usage.max()),
            fragmentation=_fragmentation(steps, size, model),
            preemptions=preemptions,
            preempted_share=sum(r.preemptions > 0 for r in requests) / len(requests)
            if requests
            else None,
            recomputed_share=_recomputed(requests, steps, preemptions),
            blocked_share=_blocked(requests, steps, config),
            refused_for_size=refused,
            hit_rate=sum(r.cached_tokens for r in started) / asked
            if asked and len(started) >= LEAST_REQUESTS
            else None,
            attainable_hit_rate=attainable if len(requests) >= LEAST_REQUESTS else None,
            seats=seats(requests, blocks, size),
        ),
        partial,
    )


def attainable_hit_rate(prompts: Iterable[Sequence[int]], block_size: int) -> float | None:
    """The part of all prompt tokens that a cache without bounds would have found.

    Prompts come one after another, each complete before the next. As in `BlockPool`, whole blocks
    are found, from the prompt's beginning on, and never its last token. None without prompts.
    """
    known: set[bytes] = set()
    hits = total = 0
    for prompt in prompts:
        total += len(prompt)
        tokens = np.asarray(prompt, dtype=np.int64)
        matching = True
        prefix = b""
        for start in range(0, len(tokens) - block_size + 1, block_size):
            block = tokens[start : start + block_size]
            prefix = hashlib.blake2b(prefix + block.tobytes(), digest_size=16).digest()
            # The last token must be computed to get the next one.
            if matching and start + block_size < len(tokens) and prefix in known:
                hits += block_size
            else:
                matching = False
            known.add(prefix)
    return hits / total if total else None


def seats(requests: Sequence[RequestRecord], blocks: int, block_size: int) -> float | None:
    """How many requests the cache holds at once on average, full to the last block.

    A running request holds its prompt and what it has generated. Seen at a random moment it is
    likelier a long one, so that it has generated on average L/2 (1 + c^2) tokens, for outputs of
    mean L and coefficient of variation c (renewal theory's mean age). None without an answer.
    """
    served = [r for r in requests if r.output_tokens]
    if not served:
        return None
    outputs = np.array([r.output_tokens for r in served], dtype=np.float64)
    inputs = np.array([r.input_tokens for r in served], dtype=np.float64)
    # A request is there as long as its answer takes, so its prompt counts by that too.
    prompt = float(inputs @ outputs / outputs.sum())
    age = float((outputs**2).sum() / (2 * outputs.sum()))
    # The last block is half full on average.
    held = (prompt + age) / block_size + 0.5
    return blocks / held


def _is_for_size(reason: str | None) -> bool:
    return reason is not None and any(words in reason for words in _FOR_SIZE)


def _fragmentation(steps: StepColumns, size: int, model: ModelFacts | None) -> float | None:
    """Slots of owned blocks without a token, over time; None of windows, which give blocks up.

    These are the ends of last blocks, and what a prompt was given ahead of its chunks.
    """
    slots = steps.blocks_used * size
    owned = float(steps.seconds @ slots)
    if owned <= 0 or not steps.used_tokens.any() or (model is not None and model.has_windows):
        return None
    return float(steps.seconds @ np.maximum(0.0, slots - steps.used_tokens)) / owned


def _recomputed(
    requests: Sequence[RequestRecord], steps: StepColumns, preemptions: int
) -> float | None:
    """The part of the prompt tokens computed that had been computed before."""
    computed = float(steps.prefill_tokens.sum())
    if not computed:
        return None
    if not preemptions:
        return 0.0
    # A request without an answer may have computed a part of its prompt only, so this is what was
    # needed at most, and the difference what was computed twice at least.
    needed = sum(
        r.input_tokens - r.cached_tokens for r in requests if r.first_scheduled is not None
    )
    return max(0.0, computed - needed) / computed


def _blocked(
    requests: Sequence[RequestRecord], steps: StepColumns, config: EngineConfig
) -> float | None:
    """The part of the steps' time in which only blocks were missing to let a request in."""
    if config.batching_mode != "continuous":
        return 0.0
    waits = (
        (steps.queue > 0)
        & (steps.running < config.max_num_seqs)
        & (steps.rows < config.max_num_batched_tokens)
    )
    if not config.enable_chunked_prefill and requests:
        # The prompt that waits may have been too long for what was left of the budget.
        longest = max(r.input_tokens for r in requests)
        waits &= config.max_num_batched_tokens - steps.rows >= longest
    return steps.share_of_time(waits)
