"""What a reader of a plan should know beside its numbers."""

from __future__ import annotations

from autotune.planning.model_shape import ModelShape
from autotune.planning.options import PlanOptions
from autotune.planning.planned_traffic import PlannedTraffic
from autotune.slo import QUALITY_METRICS, Slo


def notes_on(
    options: PlanOptions, shape: ModelShape, slo: Slo, traffic: PlannedTraffic, length: int
) -> list[str]:
    """On the model, the traffic, the SLO and what was assumed of them."""
    notes = [*shape.notes, *traffic.notes]
    if options.max_model_len is None and length < shape.max_position:
        notes.append(
            f"planned for sequences of at most {length} tokens, the longest of the traffic rounded "
            f"up; the model itself goes to {shape.max_position} (--max-model-len)"
        )
    quality = [limit.text for limit in slo.limits if limit.metric in QUALITY_METRICS]
    if quality:
        notes.append(
            f"{', '.join(quality)} is not planned: what a quantization does to answers is measured "
            "by autotune quantize and autotune bench"
        )
    if len(options.methods) > 1:
        notes.append(
            "a quantized option answers a little differently: measure its quality before buying"
        )
    peak = traffic.peak_ratio()
    if peak is not None and peak > 1 + options.headroom:
        notes.append(
            f"the trace's busiest minute has {peak:.2f} times its mean rate, above the headroom of "
            f"{options.headroom:.0%}: --headroom {peak - 1:.0%} would cover it"
        )
    if options.router == "least_loaded":
        notes.append("least_loaded is planned as round_robin, than which it spreads no worse")
    if options.router == "prefix_aware":
        notes.append("prefix_aware is planned as turns of a session that stay on one replica")
    return notes
