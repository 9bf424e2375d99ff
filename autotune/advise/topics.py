"""What a person would have to tell for a fact of a profile to be known."""

from __future__ import annotations

_OF_CONFIG = ("batching_waits", "has_ranks", "kv_quantized", "prompt_over_budget")
_OF_HARDWARE = (
    "device",
    "cuda_capability",
    "gpus",
    "gpu_kernels",
    "fast_methods",
    "cores",
    "idle_cores",
    "memory_bytes",
    "free_memory_per_cache",
    "ceilings.bandwidth",
    "critical_batch",
    "row_headroom",
)
_OF_MODEL = ("quantized", "heads_per_kv_head", "resident_share", "fits", "draft_share")


def topic_of(fact: str) -> str:
    """The engine's configuration, the hardware, the model, or the fact itself."""
    if fact.startswith("config.") or fact in _OF_CONFIG:
        return "the engine's configuration"
    if fact in _OF_HARDWARE:
        return "the hardware"
    return "the model" if fact.startswith("model.") or fact in _OF_MODEL else fact
