"""The cost of a step under other knobs, or with a technique that no knob here brings about."""

from __future__ import annotations

import dataclasses

from autotune.predict.change import Change
from autotune.predict.fit import attention_probe, linear_probe, probed_cost
from autotune.predict.step_cost import CostFactors, StepCost
from autotune.profiling.schema import ModelFacts, Probes
from engine.config import EngineConfig

# Knobs that change what a step costs in a way that no probe measures. The others change only which
# steps are made, or are handled below.
UNMEASURED_KNOBS = (
    "model",
    "device",
    "dtype",
    "tensor_parallel_size",
    "num_threads",
    "cuda_graphs",
)


class NotPredictable(ValueError):
    """A change whose effect on a step was not measured; the message names the knob."""


def apply_change(
    cost: StepCost, change: Change, model: ModelFacts, config: EngineConfig, probes: Probes
) -> StepCost:
    """The cost with the change; what was fitted to the steps stays.

    Args:
        cost: as fitted under `config`.
        change: the knobs that differ, and factors on parts of the cost. Knobs and factors that do
            not change what a step of given work costs have no effect here. A factor that is given
            beside a knob replaces what the knob does to that part.
        model: its facts.
        config: what the cost was fitted under.
        probes: of this machine.

    Raises:
        NotPredictable: a knob has an effect that was not measured.
    """
    knobs = {
        name: value for name, value in change.knobs.items() if getattr(config, name, value) != value
    }
    unmeasured = [name for name in UNMEASURED_KNOBS if name in knobs]
    if unmeasured:
        raise NotPredictable(f"no probe measures what {unmeasured[0]} does to a step")
    factors = {name: factor.value for name, factor in change.factors.items()}
    method = str(knobs.get("quantization", config.quantization))
    cache = str(knobs.get("kv_cache_dtype", config.kv_cache_dtype))
    if linear_probe(probes, method) is None:
        raise NotPredictable(f"quantization={method} was not measured on {model.name}")
    if attention_probe(probes, cache) is None:
        raise NotPredictable(f"kv_cache_dtype={cache} was not measured on {model.name}")
    probed = probed_cost(probes, method, cache)
    if method != config.quantization and not {"weight_reads", "linear_compute"} & set(factors):
        cost = dataclasses.replace(cost, layers=probed.layers, head=probed.head)
    if cache != config.kv_cache_dtype:
        if "kv_reads" not in factors:
            cost = dataclasses.replace(cost, decode_attention=probed.decode_attention)
        if "attention_compute" not in factors:
            cost = dataclasses.replace(cost, prefill_attention=probed.prefill_attention)
    known = {field.name for field in dataclasses.fields(CostFactors)}
    changed = {name: value for name, value in factors.items() if name in known}
    return dataclasses.replace(cost, factors=dataclasses.replace(cost.factors, **changed))
