"""The KV cache of a changed configuration, by the rules that the engine sizes it by."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.profiling.schema import KvCache, ModelFacts
from engine.block_groups import ONE_GROUP, BlockGroup, longest_sequence, most_owned_blocks
from engine.config import KNOBS, EngineConfig
from engine.cpu_cache_budget import CPU_DEFAULT_BYTES
from engine.engine import CacheShape


@dataclass(frozen=True, slots=True)
class Served:
    """A configuration with its model's facts under it, and its layers in groups.

    `draft` are those of a model that drafts, whose cache holds as many tokens.
    """

    config: EngineConfig
    model: ModelFacts
    groups: tuple[BlockGroup, ...] = ONE_GROUP
    draft: ModelFacts | None = None

    @property
    def block_bytes(self) -> float:
        """Bytes of one block: of all ranks together, for the layers of one group."""
        largest = max(len(group.layers) for group in self.groups)
        layers = sum(len(group.layers) for group in self.groups)
        drafting = self.draft.kv_bytes_per_token if self.draft else 0.0
        a_token = self.model.kv_bytes_per_token * largest / layers + drafting
        return self.config.block_size * a_token

    @property
    def draft_bytes(self) -> int:
        """Memory of the weights that draft."""
        return self.draft.resident_bytes if self.draft else 0

    @property
    def most_blocks(self) -> int:
        """Blocks that the engine could ever fill."""
        length = -(-self.model.max_model_len // self.config.block_size)
        seats = max(self.config.max_num_seqs, int(KNOBS["max_num_seqs"].default))
        return length * len(self.groups) * seats


def cache_after(
    base: Served,
    changed: Served,
    kv: KvCache,
    *,
    on_gpu: bool,
    gpu_bytes: int | None = None,
    capacity: float = 1.0,
    resident: float = 1.0,
) -> CacheShape | None:
    """The cache of `changed`, given what `base` was measured to have; None if it holds too little.

    On a GPU the cache has what is left of its share of the memory, so that smaller weights enlarge
    it; on a CPU it has its own size.

    Args:
        base: what was measured.
        changed: what is asked about.
        kv: the measured cache.
        on_gpu: where the model is.
        gpu_bytes: memory of one GPU.
        capacity: factor on the blocks.
        resident: factor on the bytes of the weights, beside what `changed` itself says.
    """
    blocks = kv.blocks_total
    if blocks is None:
        return None
    if _same_cache(base, changed) and not (on_gpu and _weights_differ(base, changed, resident)):
        budget = blocks * changed.block_bytes
    else:
        budget = _budget(base, changed, blocks, on_gpu, gpu_bytes, resident)
    fitting = min(int(budget / changed.block_bytes + 1e-6), changed.most_blocks)
    fitting = int(fitting * capacity)
    windows = [group.window for group in changed.groups]
    size, longest = changed.config.block_size, changed.model.max_model_len
    needed = most_owned_blocks(windows, -(-longest // size), size)
    if fitting < needed and capacity >= 1:
        return None  # the engine refuses a cache that does not hold its longest sequence
    if fitting < needed:
        longest = longest_sequence(windows, fitting, size, longest)
    return CacheShape(fitting, longest, changed.groups) if fitting > 0 and longest > 0 else None


def _same_cache(base: Served, changed: Served) -> bool:
    names = ("kv_cache_memory_bytes", "gpu_memory_utilization", "block_size")
    same = all(getattr(base.config, n) == getattr(changed.config, n) for n in names)
    return (
        same
        and base.block_bytes == changed.block_bytes
        and (base.most_blocks == changed.most_blocks)
    )


def _weights_differ(base: Served, changed: Served, resident: float) -> bool:
    before = base.model.resident_bytes + base.draft_bytes
    return changed.model.resident_bytes * resident + changed.draft_bytes != before


def _budget(
    base: Served,
    changed: Served,
    blocks: int,
    on_gpu: bool,
    gpu_bytes: int | None,
    resident: float,
) -> float:
    """Bytes that the changed configuration gives its cache, all ranks together."""
    ranks = changed.config.tensor_parallel_size
    asked = changed.config.kv_cache_memory_bytes
    if asked is not None:
        return float(asked * ranks)
    had = blocks * base.block_bytes
    was_capped = blocks >= base.most_blocks
    if not on_gpu:
        # A cache that holds all that could ever be asked for does not tell how much it might have.
        was_asked = base.config.kv_cache_memory_bytes is not None
        return max(had, CPU_DEFAULT_BYTES) if was_capped or was_asked else had
    freed = base.model.resident_bytes - changed.model.resident_bytes * resident
    freed += base.draft_bytes - changed.draft_bytes
    share = changed.config.gpu_memory_utilization - base.config.gpu_memory_utilization
    more = share * gpu_bytes * ranks if gpu_bytes else 0.0
    return had + freed + more
