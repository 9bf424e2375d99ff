"""A device whose speed is known: the real engine and model, with steps padded to a law of time.

Whatever machine the tests run on, a step takes what the law says, so that what is slow is what was
made slow. The probes and ceilings are those that measuring such a device would give.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import (
    AttentionProbe,
    Ceilings,
    LinearProbe,
    ModelFacts,
    Probes,
)
from engine.batch import Batch, BatchResult, Executor

# The head's part of the linear layers' time; small, as its rows are those that sample alone.
_HEAD = 0.02
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
_SEQUENCES = [1, 4, 16, 64]
_CONTEXTS = [16, 64, 256, 1024]


@dataclass(frozen=True, slots=True)
class Law:
    """Seconds of a step: max(weights, rows * row) + kv_tokens * kv_token + overhead, and the host.

    `weights` is what reading all weights takes, `row` the arithmetic of one row, `kv_token` reading
    one cached token, `host` the host's work before each step. `overhead` is what no probe of a part
    alone would find.
    """

    weights: float = 8e-3
    row: float = 80e-6
    kv_token: float = 2e-6
    host: float = 0.0
    overhead: float = 0.0

    def device(self, batch: Batch) -> float:
        """Seconds of the device for a batch."""
        read = sum(sequence.end for sequence in batch.sequences)
        return self.linears(batch.num_tokens) + self.kv_token * read + self.overhead

    def linears(self, rows: int) -> float:
        """Seconds of the linear layers, the head among them."""
        return max(self.weights, rows * self.row)

    def calibration(self, model: ModelFacts) -> MachineCalibration:
        """What calibrating such a device would measure."""
        bandwidth = model.weight_bytes / self.weights
        matmul = 2.0 * model.matmul_parameters / self.row
        linears = [self.linears(rows) for rows in _ROWS]
        grid = [(s, c) for s in _SEQUENCES for c in _CONTEXTS]
        return MachineCalibration(
            Ceilings(
                bandwidth=bandwidth,
                working_set_bandwidth=bandwidth,
                matmul={"bfloat16": matmul},
                compute_dtype="bfloat16",
                ridge=matmul / bandwidth,
            ),
            Probes(
                linears=[
                    LinearProbe(
                        method="none",
                        rows=_ROWS,
                        layers_s=[(1 - _HEAD) * s for s in linears],
                        head_s=[_HEAD * s for s in linears],
                    )
                ],
                attention=[
                    AttentionProbe(
                        kv_cache_dtype="auto",
                        sequences=[s for s, _ in grid],
                        contexts=[c for _, c in grid],
                        seconds=[s * c * self.kv_token for s, c in grid],
                    )
                ],
                seconds=0.0,
            ),
        )


class SlowedExecutor:
    """Runs the model, and takes as long as the law says if the model is faster."""

    pipelined = False

    def __init__(self, inner: Executor, law: Law) -> None:
        self.inner = inner
        self.law = law

    def execute(self, batch: Batch) -> BatchResult:
        """Run one step."""
        if self.law.host:
            time.sleep(self.law.host)
        result = self.inner.execute(batch)
        short = self.law.device(batch) - result.device_seconds
        if short > 0:
            began = time.perf_counter()
            time.sleep(short)
            # What was slept, not what was asked for: the rest would count as the host's.
            result.device_seconds += time.perf_counter() - began
        return result
