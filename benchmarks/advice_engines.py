"""Engines that a benchmark of configurations keeps loaded, and models for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autotune.load.open_loop import run_load
from autotune.measure import Measurement, at_rate, measure
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine

DRAIN_LIMIT_S = 60.0
WARM_REQUESTS = 4


def offered(
    engine: Engine, config: EngineConfig, requests: Sequence[LoadRequest], slo: Slo
) -> Measurement:
    """One measurement, warm."""
    run_load(engine, at_rate(requests[:WARM_REQUESTS], None), drain_limit=DRAIN_LIMIT_S)
    engine.clear_prefix_cache()
    return measure(
        engine, requests, slo=slo, config=config, drain_limit=DRAIN_LIMIT_S, seed=config.seed
    )


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """The folder of a model: the embedded one's, or that of one with random weights."""
    if name == "embedded":
        yield ""
        return
    import torch

    from benchmarks.engine_speed import LLAMA_135M, save_random_llama

    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), LLAMA_135M, torch.bfloat16)
        yield folder
