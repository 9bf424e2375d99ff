"""The cost of a step with the model over another number of ranks than was measured."""

from __future__ import annotations

import dataclasses
import math

from autotune.predict.step_cost import StepCost
from autotune.profiling.schema import Ceilings, ModelFacts
from engine.config import EngineConfig

# Without a measurement of collectives: what a rank sends to others, as a share of the bandwidth of
# its memory (NVLink has about a tenth of it, PCIe a fiftieth; ranks on a processor copy through its
# memory), and what each collective takes at least, in seconds.
_LINK_SHARE = {True: 0.1, False: 0.25}
_LATENCY_S = {True: 15e-6, False: 60e-6}
# Two collectives a layer: after attention and after the feed-forward network.
_COLLECTIVES = 2
# Standard deviations of logarithms: of what collectives take, and of how evenly work is split.
LINK_ERROR = 0.5
SPLIT_ERROR = 0.08


def in_parallel(
    cost: StepCost,
    base: EngineConfig,
    config: EngineConfig,
    model: ModelFacts,
    ceilings: Ceilings,
    *,
    on_gpu: bool,
    error: float = 0.0,
) -> StepCost:
    """The cost under `config`, whose ranks may be more or fewer than those of `base`.

    On GPUs each rank reads its share of the weights and of the keys and values, and computes its
    share. Ranks on a processor share its cores and its memory, so they gain nothing. A ring
    all-reduce sends 2 (n - 1) / n of the hidden states (Patarasuk and Yuan 2009, "Bandwidth Optimal
    All-reduce Algorithms for Clusters of Workstations").

    Args:
        cost: as fitted under `base`.
        base: what was measured.
        config: what is asked about.
        model: its facts.
        ceilings: of the device.
        on_gpu: where the model is.
        error: how far off, in standard deviations.
    """
    before, ranks = base.tensor_parallel_size, config.tensor_parallel_size
    if before == ranks:
        return cost
    if ranks == 1:
        row = latency = 0.0
    elif before > 1 and cost.coefficients.communication_base > 0:
        sent = _sent(ranks) / _sent(before)
        row = cost.coefficients.communication_row * sent
        latency = cost.coefficients.communication_base * math.log2(ranks) / math.log2(before)
    else:
        item = 4 if model.dtype == "float32" else 2
        state = model.num_layers * _COLLECTIVES * model.hidden_size * item
        row = state * _sent(ranks) / (_LINK_SHARE[on_gpu] * ceilings.bandwidth)
        latency = model.num_layers * _COLLECTIVES * _LATENCY_S[on_gpu] * math.log2(ranks)
    slower = math.exp(LINK_ERROR * error)
    share = before / ranks * math.exp(SPLIT_ERROR * error) if on_gpu else 1.0
    factors = cost.factors
    return dataclasses.replace(
        cost,
        coefficients=dataclasses.replace(
            cost.coefficients,
            communication_row=slower * row,
            communication_base=slower * latency,
        ),
        factors=dataclasses.replace(
            factors,
            weight_reads=share * factors.weight_reads,
            linear_compute=share * factors.linear_compute,
            attention_compute=share * factors.attention_compute,
            kv_reads=share * factors.kv_reads,
        ),
    )


def _sent(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks
