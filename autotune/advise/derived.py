"""Facts that follow from several fields of a profile: each a function, its docstring the meaning.

Formulas come from roofline arithmetic: a linear layer at B rows does 2 B operations a parameter and
reads it once, so arithmetic begins to bound it at B = ridge * bytes per parameter / 2.
"""

from __future__ import annotations

from typing import Any

from autotune.advise.facts import Facts, derived
from autotune.search.methods_offered import device_abilities
from autotune.speculative_models import speculative_models
from engine.checkpoints.model_folder import open_model_folder
from engine.errors import EngineError
from engine.models.registry import decoder_spec
from engine.quantize.method_table import METHODS

# What the KV cache and activations need beside the weights for a model to be of use.
_ROOM_BESIDE_WEIGHTS = 1.1


@derived("text")
def device(facts: Facts) -> str | None:
    """`cpu` or `cuda`: the device that the profile was made on."""
    return (facts.profile.hardware or {}).get("device")


@derived("number")
def cuda_capability(facts: Facts) -> float | None:
    """Compute capability as a number, 8.9 for Ada; None on a CPU, or where it is not told."""
    gpus = (facts.profile.hardware or {}).get("gpus") or []
    text = gpus[0].get("compute_capability") if gpus and device(facts) == "cuda" else None
    try:
        return None if text is None else float(str(text))
    except ValueError:
        return None


@derived("number")
def gpus(facts: Facts) -> int | None:
    """GPUs of the machine; 0 on a CPU."""
    if facts.profile.hardware is None:
        return None
    return len(facts.profile.hardware.get("gpus") or ()) if device(facts) == "cuda" else 0


@derived("truth")
def gpu_kernels(facts: Facts) -> bool | None:
    """Whether compiled kernels run on the GPU; None on a CPU."""
    status = (facts.profile.hardware or {}).get("gpu_kernels")
    return None if status is None else bool(status.get("available", True))


@derived("list")
def cpu_features(facts: Facts) -> list[str] | None:
    """Instruction sets of the processor, as Linux names them."""
    if facts.profile.hardware is None:
        return None
    return list((facts.profile.hardware.get("cpu") or {}).get("features") or ())


@derived("list")
def fast_methods(facts: Facts) -> list[str] | None:
    """Weight quantizations that the device runs as fast as floats, at prefill and at decode."""
    if facts.profile.hardware is None:
        return None
    features, capability = device_abilities(facts.profile.hardware)
    return [n for n, m in METHODS.items() if n != "none" and m.is_fast(features, capability)]


@derived("number")
def cores(facts: Facts) -> int | None:
    """Cores that the process may use."""
    return (facts.profile.hardware or {}).get("cores")


@derived("number")
def idle_cores(facts: Facts) -> float | None:
    """Cores that the process may use and the engine was told to leave; 0 if told nothing."""
    here, threads = facts.number("cores"), facts.number("config.num_threads")
    if here is None:
        return None
    return 0.0 if threads is None else max(0.0, here - threads)


@derived("number")
def memory_bytes(facts: Facts) -> float | None:
    """Memory of the device, in bytes; of a machine with several GPUs that of one."""
    value = (facts.profile.hardware or {}).get("memory_bytes")
    return None if value is None else float(value)


@derived("truth")
def quantized(facts: Facts) -> bool | None:
    """Whether the weights are quantized as they are served."""
    model = facts.profile.model
    return None if model is None else model.weight_bits < 16


@derived("truth")
def kv_quantized(facts: Facts) -> bool | None:
    """Whether the KV cache is of fewer than 16 bits an element."""
    value = facts.get("config.kv_cache_dtype")
    return None if value is None else value != "auto"


@derived("truth")
def is_server(facts: Facts) -> bool:
    """Whether the profile is of another server's endpoint, and not of the bundled engine."""
    return facts.profile.source.kind == "metrics"


@derived("number")
def resident_share(facts: Facts) -> float | None:
    """Bytes of the weights over the memory of all devices that hold them."""
    model, memory = facts.profile.model, facts.number("memory_bytes")
    if model is None or not memory:
        return None
    return model.resident_bytes / (memory * (facts.number("config.tensor_parallel_size") or 1.0))


@derived("number")
def decode_batch(facts: Facts) -> float | None:
    """Mean sequences of a decode step."""
    decode = facts.profile.phase("decode") or facts.profile.phase("mixed")
    return None if decode is None else decode.mean_batch


@derived("number")
def critical_batch(facts: Facts) -> float | None:
    """Rows at which arithmetic begins to bound a linear layer: ridge * bytes per weight / 2."""
    ceilings, model = facts.profile.ceilings, facts.profile.model
    if ceilings is None or model is None:
        return None
    return ceilings.ridge * model.weight_bits / 16


@derived("number")
def row_headroom(facts: Facts) -> float | None:
    """How many times more rows a decode step could have before arithmetic bounds it."""
    batch, critical = facts.number("decode_batch"), facts.number("critical_batch")
    return None if not batch or critical is None else critical / batch


@derived("number")
def heads_per_kv_head(facts: Facts) -> float | None:
    """Query heads that share a key and value head; 1 is multi-head attention."""
    model = facts.profile.model
    return None if model is None else model.num_heads / model.num_kv_heads


@derived("number")
def mean_context(facts: Facts) -> float | None:
    """Tokens of a mean sequence halfway through its answer."""
    traffic = facts.profile.traffic
    if traffic.input_tokens is None or traffic.output_tokens is None:
        return None
    return traffic.input_tokens.mean + traffic.output_tokens.mean / 2


@derived("number")
def prompt_tail(facts: Facts) -> float | None:
    """The 99th percentile of prompt lengths over their median."""
    lengths = facts.profile.traffic.input_tokens
    return None if lengths is None else lengths.p99 / max(lengths.p50, 1.0)


@derived("number")
def answer_tail(facts: Facts) -> float | None:
    """The 99th percentile of answer lengths over their mean."""
    lengths = facts.profile.traffic.output_tokens
    return None if lengths is None else lengths.p99 / max(lengths.mean, 1.0)


@derived("number")
def prompt_over_budget(facts: Facts) -> float | None:
    """The 95th percentile of prompt lengths over the tokens that one step may compute."""
    lengths, budget = facts.profile.traffic.input_tokens, facts.number("config." + _BUDGET)
    return None if lengths is None or not budget else lengths.p95 / budget


_BUDGET = "max_num_batched_tokens"


@derived("number")
def unused_hits(facts: Facts) -> float | None:
    """Share of prompt tokens that a larger or better used prefix cache would have found."""
    kv = facts.profile.kv
    if kv.attainable_hit_rate is None:
        return None
    return max(0.0, kv.attainable_hit_rate - (kv.hit_rate or 0.0))


@derived("number")
def reserved_waste(facts: Facts) -> float | None:
    """KV fragmentation beyond what half-filled last blocks explain: reserved and never used."""
    kv, context = facts.profile.kv, facts.number("mean_context")
    if kv.fragmentation is None or kv.block_size is None or not context:
        return None
    last_block = kv.block_size / 2
    return max(0.0, kv.fragmentation - last_block / (context + last_block))


@derived("number")
def free_memory_per_cache(facts: Facts) -> float | None:
    """Free memory of a CPU machine over the bytes of the KV cache."""
    memory = (facts.profile.hardware or {}).get("memory") or {}
    available, cache = memory.get("available_bytes"), facts.profile.kv.total_bytes
    return None if available is None or not cache else float(available) / cache


@derived("number")
def best_ngram_tokens(facts: Facts) -> float | None:
    """Most tokens a decode step would yield by prompt lookup, by the dry run on these tokens."""
    dry_run = facts.profile.speculation
    if dry_run is None or not dry_run.tokens_per_step:
        return None
    return max(dry_run.tokens_per_step.values())


@derived("number")
def draft_share(facts: Facts) -> float | None:
    """Parameters of the smaller model at hand that could draft for this one, over this one's."""
    folder = _speculative_model(facts, "draft_model")
    model = facts.profile.model
    if folder is None or model is None:
        return None
    try:
        return decoder_spec(open_model_folder(folder)).num_parameters / model.parameters
    except EngineError:
        return None


@derived("truth")
def has_heads(facts: Facts) -> bool:
    """Whether heads that were trained for the model are at hand."""
    return _speculative_model(facts, "medusa") is not None


def _speculative_model(facts: Facts, method: str) -> str | None:
    config = facts.profile.engine_config or {}
    if not config.get("model"):
        return None
    return speculative_models(config["model"], config.get("speculative_model")).get(method)


@derived("truth")
def has_ranks(facts: Facts) -> bool | None:
    """Whether the model is divided among several devices."""
    ranks = facts.profile.communication.ranks if facts.profile.communication else None
    size = facts.number("config.tensor_parallel_size") if ranks is None else ranks
    return None if size is None else size > 1


@derived("list")
def limited(facts: Facts) -> list[str]:
    """Metrics that the promise limits."""
    return [limit.metric for limit in facts.slo.limits]


@derived("truth")
def seats_bind(facts: Facts) -> bool | None:
    """Whether requests waited while every seat (max_num_seqs) was taken."""
    share = facts.profile.queueing.at_seat_limit_share
    return None if share is None else share > _NOTICEABLE


@derived("truth")
def token_budget_binds(facts: Facts) -> bool | None:
    """Whether requests waited while a step's token budget was used up."""
    share = facts.profile.queueing.at_token_budget_share
    return None if share is None else share > _NOTICEABLE


# A share of step time below this leaves no mark on a percentile.
_NOTICEABLE = 0.02


@derived("truth")
def fits(facts: Facts) -> bool | None:
    """Whether weights and a small KV cache fit into the memory."""
    share = facts.number("resident_share")
    return None if share is None else share * _ROOM_BESIDE_WEIGHTS < 1


@derived("truth")
def batching_waits(facts: Facts) -> bool | None:
    """Whether a batch is filled and run to its end before others are admitted."""
    mode: Any = facts.get("config.batching_mode")
    return None if mode is None else mode != "continuous"
