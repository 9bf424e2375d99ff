"""Every way of serving a model that a plan looks at: GPU, ranks, quantization, batch limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotune.hardware.catalogue import Gpu
from autotune.planning.memory import MemoryPlan, memory_plan
from autotune.planning.methods_run import cache_dtypes_run, why_not
from autotune.planning.model_shape import ModelShape
from autotune.planning.planned_traffic import LengthSample
from engine.config import EngineConfig
from engine.engine import CacheShape

# A small step keeps answers smooth while prompts arrive, a large one gets prompts through.
STEP_TOKENS = (2048, 8192, 512)  # the usual first
_SEATS = (16, 32, 64, 128, 256, 512, 1024)
# More ranks than a server has GPUs make sense only where a link joins them.
_SERVER = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """A GPU, the ranks of one replica, and a quantization."""

    gpu: Gpu
    ranks: int
    quantization: str
    kv_cache_dtype: str

    @property
    def label(self) -> str:
        """How a person would say it."""
        ranks = f"{self.ranks}x " if self.ranks > 1 else ""
        return f"{ranks}{self.gpu.name} {self.quantization}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice with batch limits, and what they leave of the memory; `cache` None does not fit."""

    choice: Choice
    config: EngineConfig
    memory: MemoryPlan

    @property
    def cache(self) -> CacheShape | None:
        """The KV cache of one replica."""
        return self.memory.cache

    def seats(self, sample: LengthSample) -> float:
        """Most sequences at once: by the limit, and by what the cache holds of the traffic."""
        return min(float(self.config.max_num_seqs), self.memory.kv_tokens / sample.mean_footprint)


def choices(
    shape: ModelShape,
    gpus: Sequence[Gpu],
    sizes: Sequence[int],
    methods: Sequence[str],
    kv_cache_dtype: str,
) -> tuple[list[Choice], list[str]]:
    """What there is to choose from, and why the rest is not."""
    found, notes = [], []
    if shape.stored is not None:
        methods = ("none",)
        notes.append("the checkpoint is quantized already and is served as it is")
    for gpu in gpus:
        cache = kv_cache_dtype
        if cache not in cache_dtypes_run(gpu):
            notes.append(f"{gpu.name} has no fast {cache} cache: planned with auto")
            cache = "auto"
        for method in methods:
            reason = why_not(gpu, method)
            if reason is not None:
                notes.append(reason)
                continue
            found += [Choice(gpu, size, method, cache) for size in _sizes(shape, gpu, sizes)]
    notes += [o for size in sizes if (o := shape.obstacle(size)) is not None]
    return found, list(dict.fromkeys(notes))


def _sizes(shape: ModelShape, gpu: Gpu, sizes: Sequence[int]) -> Iterator[int]:
    for size in sizes:
        if shape.obstacle(size) is None and (size <= _SERVER or size <= gpu.max_link_size):
            yield size


def candidates(
    shape: ModelShape, choice: Choice, max_model_len: int, sample: LengthSample
) -> list[Candidate]:
    """A choice under each batch limit that fits; under the smallest alone if none does.

    `max_num_seqs` is as high as the cache holds sequences of the traffic: more seats stay empty.
    """
    found = []
    for tokens in STEP_TOKENS:
        roomy = _candidate(shape, choice, max_model_len, tokens, min(256, tokens))
        if roomy.cache is None:
            found.append(roomy)
            continue
        held = roomy.memory.kv_tokens / sample.mean_footprint
        seats = next((s for s in _SEATS if s >= held), _SEATS[-1])
        fitted = _candidate(shape, choice, max_model_len, tokens, min(seats, tokens))
        found.append(fitted if fitted.cache is not None else roomy)
    fitting = [candidate for candidate in found if candidate.cache is not None]
    return fitting or [min(found, key=lambda c: c.memory.shortfall_bytes)]


def _candidate(
    shape: ModelShape, choice: Choice, max_model_len: int, tokens: int, seats: int
) -> Candidate:
    config = EngineConfig(
        device="cuda",
        tensor_parallel_size=choice.ranks,
        quantization=choice.quantization,
        kv_cache_dtype=choice.kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=seats,
        max_num_batched_tokens=tokens,
    )
    return Candidate(choice, config, memory_plan(shape, choice.gpu, config, cap_to_seats=False))
