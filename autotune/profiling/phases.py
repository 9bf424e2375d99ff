"""What prefill, decode and mixed steps compute and move, against what the device can do.

Formulas, with N the parameters that a token meets in matrix products, H those of the output head,
A the attention features (query heads times head size over all layers) and k the KV bytes a token:

- operations: 2 N rows + 2 H sampled + 4 A pairs, a multiply-add counting two. The pairs of query
  and key of a decode are its context; those of a prompt chunk are under the causal mask, half of
  its square. A drafted token is a row, a sampled one and its context's pairs. (Chowdhery et al.
  2022, PaLM, appendix B, and Megatron-LM's count.)
- bytes: weights once a step, the head only where something is sampled, of a mixture of experts
  those that a batch is expected to touch; and k for each cached token read. Embeddings are looked
  up, not streamed; activations stay in caches.
- MFU = operations / (device time * measured peak); MBU = (weight bytes / bandwidth of such a
  working set + KV bytes / bandwidth) / device time (Databricks 2023, with KV reads counted). Keys
  and values of a step that are fewer than its weights are read at the working set's bandwidth too:
  where a cache holds the weights from step to step, it holds them as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autotune.profiling.enough import LEAST_STEPS, lacking
from autotune.profiling.schema import Bound, Ceilings, ModelFacts, Phase, PhaseName
from autotune.profiling.step_columns import Floats, Mask, StepColumns

# Below this share of both ceilings neither is what limits a step: launches and small kernels are.
NEAR_CEILING = 0.3
# A phase of less of the time than this is not missed where it cannot be told.
NOTEWORTHY = 0.05


class Work(NamedTuple):
    """Operations, and bytes of weights and of keys and values, by step."""

    flops: Floats
    weight_bytes: Floats
    kv_bytes: Floats


def step_work(steps: StepColumns, model: ModelFacts) -> Work:
    """What each step computes and reads; see the module for the formulas."""
    flops = (
        2.0 * model.matmul_parameters * steps.rows
        + 2.0 * model.head_parameters * (steps.sampled + steps.drafted)
        + 4.0 * model.attention_features * (steps.decode_pairs + steps.prefill_pairs)
    )
    return Work(flops, weight_bytes(steps, model), model.kv_bytes_per_token * steps.kv_tokens)


def weight_bytes(steps: StepColumns, model: ModelFacts) -> Floats:
    """Bytes of weights that each step reads."""
    head = float(model.head_bytes)
    dense = model.weight_bytes - model.expert_bytes - head
    read = np.where(steps.rows > 0, dense, 0.0)
    read = read + np.where(steps.sampled > 0, head, 0.0)
    if model.num_experts:
        read = read + model.expert_bytes * experts_touched(steps.rows, model)
    return np.asarray(read, dtype=np.float64)


def experts_touched(rows: Floats, model: ModelFacts) -> Floats:
    """The expected share of a layer's experts that so many tokens meet, if they choose evenly.

    1 - (1 - k/E)^rows, for k of E experts a token.
    """
    missed = 1.0 - model.experts_per_token / model.num_experts
    return np.asarray(1.0 - missed**rows, dtype=np.float64)


def phases(
    steps: StepColumns,
    model: ModelFacts | None,
    ceilings: Ceilings | None,
    devices: int = 1,
) -> tuple[list[Phase], list[str]]:
    """The phases that there were, and what could not be told of them.

    `devices` is over how many of the measured device the ranks spread.
    """
    work = step_work(steps, model) if model is not None and steps.tells_attention else None
    whole = float(steps.seconds.sum())
    kinds: dict[PhaseName, Mask] = {
        "prefill": (steps.prefill_tokens > 0) & (steps.decodes == 0),
        "decode": (steps.prefill_tokens == 0) & (steps.decodes > 0),
        "mixed": (steps.prefill_tokens > 0) & (steps.decodes > 0),
    }
    found: list[Phase] = []
    partial: list[str] = []
    for name, mask in kinds.items():
        count = int(mask.sum())
        if not count:
            continue
        enough = count >= LEAST_STEPS
        share = float(steps.seconds[mask].sum()) / whole if whole > 0 else 0.0
        if not enough and share >= NOTEWORTHY:
            partial.append(
                lacking(f"the arithmetic of the {name} phase", "steps", LEAST_STEPS, count)
            )
        seconds, device = steps.seconds[mask], float(steps.device[mask].sum())
        chosen = work if enough else None
        flops = None if chosen is None else float(chosen.flops[mask].sum())
        weights = None if chosen is None else float(chosen.weight_bytes[mask].sum())
        kv = None if chosen is None else float(chosen.kv_bytes[mask].sum())
        mfu, mbu = _utilisation(chosen, mask, device, ceilings, devices)
        found.append(
            Phase(
                name=name,
                steps=count,
                seconds=float(seconds.sum()),
                share=share,
                device_seconds=device,
                host_seconds=float(steps.host[mask].sum()),
                tokens=int(steps.rows[mask].sum()),
                sampled=int(steps.sampled[mask].sum()),
                mean_batch=float(steps.sequences[mask].mean()),
                step_p50=float(np.percentile(seconds, 50)),
                step_p95=float(np.percentile(seconds, 95)),
                flops=flops,
                weight_bytes=weights,
                kv_bytes=kv,
                intensity=None
                if flops is None or weights is None or kv is None or weights + kv <= 0
                else flops / (weights + kv),
                mfu=mfu,
                mbu=mbu,
                bound=_bound(mfu, mbu),
            )
        )
    if model is not None and len(steps) and not steps.tells_attention:
        partial.append(
            "operations and bytes are unknown: the steps were recorded by an earlier release, "
            "which did not tell what attention computes"
        )
    return found, partial


def _utilisation(
    work: Work | None,
    mask: Mask,
    device_seconds: float,
    ceilings: Ceilings | None,
    devices: int,
) -> tuple[float | None, float | None]:
    """MFU and MBU of the steps of `mask`."""
    if work is None or ceilings is None or device_seconds <= 0:
        return None, None
    available = device_seconds * devices
    peak = ceilings.matmul.get(ceilings.compute_dtype)
    mfu = float(work.flops[mask].sum()) / (available * peak) if peak else None
    weights, kv = work.weight_bytes[mask], work.kv_bytes[mask]
    near = ceilings.working_set_bandwidth
    floor = weights / near + kv / np.where(kv <= weights, near, ceilings.bandwidth)
    return mfu, float(floor.sum()) / available


def _bound(mfu: float | None, mbu: float | None) -> Bound | None:
    """The nearer ceiling, or `overhead` where neither is near."""
    if mfu is None or mbu is None:
        return None
    if max(mfu, mbu) < NEAR_CEILING:
        return "overhead"
    return "compute" if mfu >= mbu else "bandwidth"
