"""Named formulas of the technique table: from a profile to a factor on a term.

A factor scales a term of `autotune.predict.change`: below 1 is less work. `low` and `high` bound
90% of what published systems reach between the formula's ideal and its worst case. A formula that
lacks a fact gives None; the advice then has no predicted gain from it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np

from autotune.advise.facts import Facts
from autotune.advise.speculation import drafts_for_load
from autotune.predict.change import Factor
from autotune.profiling.schema import Spread

Formula = Callable[..., Factor | None]
FORMULAS: dict[str, Formula] = {}


def _formula(function: Formula) -> Formula:
    FORMULAS[function.__name__] = function
    return function


@_formula
def weight_bits_ratio(facts: Facts, *, bits: float) -> Factor | None:
    """Time of reading the weights at `bits` an element (scales included) over that of today.

    The ideal is the ratio of bytes. gpt-fast on an A100 got 1.48x of int8's 2x and 1.88x of int4's
    3.6x (README, Llama-2-7B), Marlin on an A10 all of 3.87x up to 16 rows (README): exponents of
    0.5 and 1 on the ratio. 0.75 is what FP8 gets on large projections of an H200 (1.6x to 1.8x).
    """
    model = facts.profile.model
    if model is None:
        return None
    ratio = bits / model.weight_bits
    return _ordered(ratio**0.75, ratio, ratio**0.5)


@_formula
def resident_bits_ratio(facts: Facts, *, bits: float) -> Factor | None:
    """Memory of the weights at `bits` an element over that of today; embeddings stay as they are.

    Linear layers are the matmul parameters; the rest keeps its bytes.
    """
    model = facts.profile.model
    if model is None:
        return None
    linear = model.matmul_parameters * model.weight_bits / 8
    # A mixture of experts keeps experts that one token does not meet; they shrink too.
    share = 1.0 if model.has_experts else min(1.0, linear / model.resident_bytes)
    value = 1 - share * (1 - bits / model.weight_bits)
    return Factor(value, value * 0.98, value * 1.05)


@_formula
def kv_bits_ratio(facts: Facts, *, bits: float) -> Factor | None:
    """Time of reading keys and values at `bits` an element over that at 16.

    Ideal: the ratio of bytes, with one 32-bit scale a head and token. Measured on an H200 for FP8:
    1.9x to 2.0x (TensorRT-LLM), 1.3x to 1.4x (FlashAttention-3), by NVIDIA's kernel tables.
    """
    model = facts.profile.model
    if model is None:
        return None
    ratio = (bits + 32 / model.head_dim) / 16
    return _ordered(ratio**0.7, ratio, ratio**0.4)


@_formula
def kv_capacity_ratio(facts: Facts, *, bits: float) -> Factor | None:
    """Tokens that fit into the same cache at `bits` an element, over today's."""
    model = facts.profile.model
    if model is None:
        return None
    value = 16 / (bits + 32 / model.head_dim)
    return Factor(value, value * 0.95, value)


@_formula
def kv_capacity_of_freed_weights(facts: Facts, *, bits: float) -> Factor | None:
    """How much larger the cache grows when smaller weights free memory of a GPU for it.

    On a CPU the cache has a size of its own: no change.
    """
    model, cache = facts.profile.model, facts.profile.kv.total_bytes
    if model is None or not cache or facts.get("device") != "cuda":
        return None
    left = resident_bits_ratio(facts, bits=bits)
    assert left is not None
    value = 1 + model.resident_bytes * (1 - left.value) / cache
    return Factor(value, 1 + (value - 1) * 0.9, value)


@_formula
def uncached_prompt(facts: Facts) -> Factor | None:
    """Prompt tokens left to compute at the attainable hit rate over those computed today.

    (1 - attainable) / (1 - hits). The high end finds half of what a boundless cache would.
    """
    kv = facts.profile.kv
    unused = facts.number("unused_hits")
    if unused is None or (kv.hit_rate or 0.0) >= 1:
        return None
    today = 1 - (kv.hit_rate or 0.0)
    value = max(0.01, (today - unused) / today)
    return Factor(value, value, (1 + value) / 2)


@_formula
def ranks_device(facts: Facts, *, ranks: float) -> Factor | None:
    """Device time of a step divided among `ranks` over that of one device.

    gpt-fast (A100, NVLink, Llama-2-7B, bf16): 1.61x, 2.42x and 3.13x at 2, 4 and 8, thus
    1/n + 0.12 + 0.04 (log2 n - 1). Low: 1/n plus a third of that; high: over PCIe, three times it.
    """
    if facts.profile.model is None:
        return None
    lost = 0.12 + 0.04 * (math.log2(ranks) - 1)
    return Factor(1 / ranks + lost, 1 / ranks + lost / 3, 1 / ranks + 3 * lost)


@_formula
def ranks_given_up(facts: Facts) -> Factor | None:
    """Device time of a step on half as many ranks: the inverse of what `ranks_device` says of two.

    Ranks on a processor share its cores and its memory; fewer of them lose nothing.
    """
    if facts.get("device") == "cpu":
        return Factor(1.0, 0.9, 1.1)
    doubled = ranks_device(facts, ranks=2)
    if doubled is None:
        return None
    return _ordered(1 / doubled.value, 1 / doubled.high, min(2.0, 1 / doubled.low))


@_formula
def kv_capacity_of_ranks(facts: Facts, *, ranks: float) -> Factor | None:
    """Growth of the cache when `ranks` devices share the weights and each adds its memory.

    (n M u - W) / (M u - W), with M u the memory that weights and cache take together today. Where
    the weights alone exceed one device, the ratio has no base: None.
    """
    model, cache = facts.profile.model, facts.profile.kv.total_bytes
    if model is None or not cache:
        return None
    value = (ranks * (model.resident_bytes + cache) - model.resident_bytes) / cache
    return Factor(value, 1 + (value - 1) * 0.85, value)


@_formula
def drafted_tokens_per_step(facts: Facts) -> Factor | None:
    """Tokens a decode step yields by prompt lookup, from the dry run on this traffic.

    The number of draft tokens is the one that pays most at this batch; see `speculation`. Prompts
    that were made up have no text to look up: the dry run then says nothing.
    """
    plan = drafts_for_load(facts)
    if plan is None:
        return None
    extra = plan.tokens_per_step - 1
    return Factor(1 + extra, 1 + extra * 0.8, 1 + extra * 1.1)


@_formula
def drafted_tokens_verified(facts: Facts) -> Factor | None:
    """Tokens a decode step computes a sequence for them: 1 + drafts where any were found."""
    plan = drafts_for_load(facts)
    if plan is None:
        return None
    value = 1 + plan.drafts * plan.hit_share
    return Factor(value, value, value)


@_formula
def drafting_by_a_model(facts: Facts, *, drafts: float) -> Factor | None:
    """Time of drafting so many tokens by a smaller model, over that of a step.

    A draft's step reads its own weights; a tenth of a step more each for launches and the host at
    worst. Where no smaller model is at hand, what Spec-Bench's (A100, Vicuna-7B) took.
    """
    if facts.profile.model is None:
        return None
    share = facts.number("draft_share")
    if share is None:
        return Factor(0.35, 0.15, 0.6)
    return Factor(drafts * (share + 0.03), drafts * share, drafts * (share + 0.1))


@_formula
def clipped_answers(facts: Facts, *, percentile: float) -> Factor | None:
    """Mean answer over today's if none exceeded the given percentile (50, 95 or 99) of lengths.

    The mean of min(length, cap) with the quantile function drawn straight through the known ones.
    """
    lengths = facts.profile.traffic.output_tokens
    if lengths is None or lengths.mean <= 0:
        return None
    points = [0.0, 0.5, 0.95, 0.99, 1.0]
    values = _quantiles(lengths)
    cap = values[points.index(percentile / 100)]
    grid = np.linspace(0, 1, 2001)
    drawn = np.interp(grid, points, values)
    value = float(np.minimum(drawn, cap).mean() / max(drawn.mean(), 1e-9))
    return Factor(value, max(0.01, 1 - (1 - value) * 1.5), 1 - (1 - value) * 0.5)


@_formula
def repeated_requests(facts: Facts) -> Factor | None:
    """Requests that still reach the model behind a cache of responses.

    About 31% of a user's queries repeat an earlier one (Gill et al. 2024, MeanCache). A repeated
    prompt would find itself in the prefix cache, so that no more repeat here than hits are
    attainable, where that is known.
    """
    attainable = facts.number("kv.attainable_hit_rate")
    most = 0.31 if attainable is None else min(0.31, attainable)
    return Factor(1 - most / 2, 1 - most, 1.0)


@_formula
def cores_in_use(facts: Facts) -> Factor | None:
    """Time of arithmetic on all cores over that on the threads in use; the high end gains half."""
    threads, here = facts.number("config.num_threads"), facts.number("cores")
    if not threads or not here or threads >= here:
        return None
    value = threads / here
    return Factor(value, value, (1 + value) / 2)


@_formula
def shared_kv_heads(facts: Facts, *, heads_per_kv_head: float) -> Factor | None:
    """Keys and values of a model with that many query heads to each (at most all), over this."""
    model, now = facts.profile.model, facts.number("heads_per_kv_head")
    if model is None or now is None:
        return None
    most = min(heads_per_kv_head, model.num_heads)
    if now >= most:
        return None
    value = now / most
    return _ordered(value, value, math.sqrt(value))


@_formula
def kept_context(facts: Facts, *, tokens: float) -> Factor | None:
    """Keys and values read with a window of `tokens` over those of the mean context."""
    context = facts.number("mean_context")
    if not context or context <= tokens:
        return None
    value = tokens / context
    return _ordered(value, value, math.sqrt(value))


@_formula
def offloaded_reads(facts: Facts, *, link: float, memory: float) -> Factor | None:
    """Time of reading weights of which a part comes over a link of `link` bytes/s each step.

    The part is what exceeds the device's memory (a tenth of it kept for the cache); `memory` is the
    device's own bandwidth where none was measured.
    """
    model, room = facts.profile.model, facts.number("memory_bytes")
    if model is None or not room:
        return None
    over = max(0.0, model.resident_bytes - 0.9 * room) / model.resident_bytes
    if over == 0:
        return None
    ceilings = facts.profile.ceilings
    slower = (ceilings.bandwidth if ceilings else memory) / link
    value = 1 - over + over * slower
    return Factor(value, 1 - over + over * slower * 0.8, 1 - over + over * slower * 1.6)


@_formula
def device_bandwidth(facts: Facts, *, bandwidth: float, cached: float = 0.0) -> Factor | None:
    """Time of reading on a device of `bandwidth` bytes/s by its data sheet over this one's.

    Devices reach 65% to 90% of the sheet at decode, 80% as a rule (NVIDIA's kernel tables).
    `cached` chooses what is replaced: 1 the bandwidth of the working set (a small model lies in a
    CPU's cache), 0 that of main memory.
    """
    ceilings = facts.profile.ceilings
    if ceilings is None:
        return None
    now = ceilings.working_set_bandwidth if cached else ceilings.bandwidth
    return Factor(now / (0.8 * bandwidth), now / (0.9 * bandwidth), now / (0.65 * bandwidth))


@_formula
def device_arithmetic(facts: Facts, *, flops: float) -> Factor | None:
    """Time of matrix products on a device of `flops` operations/s (dense, by its data sheet).

    Against the measured ceiling here; 80% of the sheet as a rule, 65% to 95% (NVIDIA's tables).
    """
    ceilings = facts.profile.ceilings
    now = ceilings.matmul.get(ceilings.compute_dtype) if ceilings else None
    if not now:
        return None
    return Factor(now / (0.8 * flops), now / (0.95 * flops), now / (0.65 * flops))


@_formula
def launches(facts: Facts, *, kernels: float) -> Factor | None:
    """Host time of a step on a GPU over today's: a captured step still starts every kernel.

    `kernels` a layer at 2 us each: 1.3 us at a boundary within a CUDA graph (Hazy Research 2025),
    5 us for a launch from the host.
    """
    model, host = facts.profile.model, facts.profile.host
    if model is None or host is None or host.per_step_s <= 0:
        return None
    each = model.num_layers * kernels / host.per_step_s
    return Factor(1 + each * 2e-6, 1 + each * 1.3e-6, 1 + each * 5e-6)


@_formula
def price_ratio(facts: Facts, *, low: float, usual: float, high: float) -> Factor | None:
    """Price of other hardware, USD an hour, over that of this one; None where that is not told."""
    now = facts.profile.price
    return None if not now else Factor(usual / now, low / now, high / now)


@_formula
def price_of_gpus(facts: Facts, *, needed: float) -> Factor | None:
    """Price of as many GPUs over that of those that are here, which are paid for in any case."""
    here = facts.number("gpus")
    if not here:
        return None
    value = max(1.0, needed / here)
    return Factor(value, value, value)


@_formula
def without_others(facts: Facts) -> Factor | None:
    """Device time on a quiet machine over today's, if others cause what no work explains.

    What of it is small kernels stays, so that half of it is taken to go; the low end is all of it.
    """
    shares = [facts.number(f"breakdown.{m}.other") for m in ("tpot", "throughput", "ttft")]
    known = [share for share in shares if share is not None]
    if not known:
        return None
    return Factor(1 - known[0] / 2, max(0.05, 1 - known[0]), 1.0)


@_formula
def unthrottled(facts: Facts) -> Factor | None:
    """Device time at full clocks over today's: the mean clock over the highest one."""
    gpu = facts.profile.gpu
    if gpu is None or gpu.clock_ratio is None:
        return None
    return _ordered(gpu.clock_ratio, gpu.clock_ratio, math.sqrt(gpu.clock_ratio))


@_formula
def balanced(facts: Facts) -> Factor | None:
    """Time of collectives if no rank waited for a slower one, over today's."""
    communication = facts.profile.communication
    if communication is None or communication.imbalance is None:
        return None
    value = max(0.01, 1 - communication.imbalance)
    return Factor(value, value, (1 + value) / 2)


@_formula
def prompts_at_median(facts: Facts, *, share: float) -> Factor | None:
    """Prompt tokens over today's if prompts were shortened to `share` of their length."""
    if facts.profile.traffic.input_tokens is None:
        return None
    return Factor(share, share * 0.8, (1 + share) / 2)


def _quantiles(lengths: Spread) -> list[float]:
    # The lowest length is not recorded; a mirror of the median about it is near enough.
    low = max(1.0, 2 * lengths.p50 - lengths.p95)
    return [min(low, lengths.p50), lengths.p50, lengths.p95, lengths.p99, lengths.max]


def _ordered(value: float, low: float, high: float) -> Factor:
    return Factor(value, min(low, high, value), max(low, high, value))


def formula_arguments(name: str) -> set[str]:
    """Names of the arguments that a formula takes beside the facts."""
    return set(inspect.signature(FORMULAS[name]).parameters) - {"facts"}
