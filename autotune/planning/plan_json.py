"""A plan as `--json` and plan.json tell it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autotune.hardware.efficiency import efficiency_of

if TYPE_CHECKING:
    from autotune.hardware.catalogue import Gpu
    from autotune.planning.plan import Plan


def plan_payload(plan: Plan) -> dict[str, Any]:
    """By the keys of `plan --json`, without the schema version."""
    options = plan.request
    shape = plan.shape
    prices = {o.candidate.choice.gpu.name: o.price for o in plan.options}
    return {
        "slo_met": plan.slo_met,
        "request": {
            "model": {
                "name": shape.name,
                "path": options.model,
                "architecture": shape.architecture,
                "parameters": shape.num_parameters,
                "active_parameters": shape.active_parameters,
                "max_model_len": shape.max_position,
            },
            "gpus": [gpu.name for gpu in plan.gpus],
            "rate": plan.rate,
            "design_rate": plan.rate * (1 + options.headroom),
            "headroom": options.headroom,
            "spares": options.spares,
            "slo": str(plan.slo),
            "probability": options.probability,
            "objective": options.objective,
            "growth": None if options.growth is None else options.growth.to_json(),
            "workload": plan.workload,
            "max_model_len": plan.max_model_len,
            "draws": options.draws,
            "seed": options.seed,
            "calibration": None if options.calibration is None else str(options.calibration),
            "router": options.router,
        },
        "options": [option.to_json() for option in plan.options],
        "frontier": list(plan.frontier),
        "growth": list(plan.growth),
        "sensitivity": list(plan.sensitivity),
        "catalogue": {
            gpu.name: _gpu(gpu)
            | {"price": price.to_json() if (price := prices.get(gpu.name)) else None}
            for gpu in plan.gpus
        },
        "would_fit": list(plan.would_fit),
        "notes": list(plan.notes),
    }


def _gpu(gpu: Gpu) -> dict[str, Any]:
    efficiency = efficiency_of(gpu)
    factors: dict[str, Any] = {}
    for name in efficiency.spread.__dataclass_fields__:
        value = getattr(efficiency.spread, name)
        if hasattr(value, "to_json"):
            factors[name] = value.to_json()
        else:
            factors |= {f"{name} {key}": factor.to_json() for key, factor in value.items()}
    return {
        **gpu.to_json(),
        "rates": dict(gpu.rates),
        "bandwidth": gpu.bandwidth,
        "efficiency": factors,
        "efficiency_basis": {"basis": efficiency.basis, "date": efficiency.date},
    }
