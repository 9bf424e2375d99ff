"""The quality of a written checkpoint against the model that it was made of."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.quality import loss_against, score_held_out
from engine.config import EngineConfig
from engine.loading import load_model

# The cache of one window of the held-out text; scoring brings its own.
_CACHE_BYTES = 64 << 20


def measure_quality(
    original: EngineConfig,
    checkpoint: Path,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> dict[str, Any] | None:
    """`QualityLoss` as a dict; None without a tokenizer, or if `stop` was set.

    One model is in memory at a time.

    Raises:
        engine.errors.EngineError: one of them does not load, for want of memory above all.
    """
    original = original.replace(kv_cache_memory_bytes=_CACHE_BYTES, max_num_seqs=1)
    with contextlib.closing(load_model(original)) as loaded:
        reference = score_held_out(loaded, original)
    del loaded
    gc.collect()
    if reference is None or (stop is not None and stop.is_set()):
        return None
    say("measuring the quality: the quantized one")
    quantized = original.replace(model=str(checkpoint))
    with contextlib.closing(load_model(quantized)) as loaded:
        return loss_against(score_held_out(loaded, quantized), reference)
