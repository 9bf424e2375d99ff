"""Where nothing holds a model, or nothing keeps a promise: what would, and what is in the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autotune.hardware.catalogue import Catalogue, Gpu
from autotune.planning.candidates import Candidate, Choice, candidates
from autotune.planning.floors import Floor, first_token_floor, token_floor
from autotune.planning.methods_run import why_not
from autotune.planning.model_shape import ModelShape
from autotune.planning.options import TENSOR_PARALLEL_SIZES
from autotune.planning.planned_traffic import LengthSample
from autotune.slo import Slo, statistic_of
from autotune.slo_grammar import Limit

_METHODS = ("none", "fp8", "int8", "int4")
_SERVER = 8
_TOLD = 3


def what_would_fit(
    shape: ModelShape,
    asked: Sequence[Gpu],
    catalogue: Catalogue,
    max_model_len: int,
    sample: LengthSample,
) -> list[str]:
    """Sentences on the fewest GPUs, of those asked for and of all others, that hold a model."""
    told = []
    for gpu in asked:
        found = _fewest(shape, gpu, max_model_len, sample)
        if found is not None:
            told.append(_sentence(gpu, *found))
    if told:
        return told
    names = {gpu.name for gpu in asked}
    others = []
    for name in catalogue.names():
        gpu = catalogue.find(name)
        found = None if name in names else _fewest(shape, gpu, max_model_len, sample)
        if found is not None:
            usd = gpu.price.usd_per_hour if gpu.price else float("inf")
            others.append((found[0] * usd, found[0], gpu.name, gpu, found))
    others.sort(key=lambda other: other[:3])
    told = [_sentence(gpu, *found) for _, _, _, gpu, found in others[:_TOLD]]
    return told or [
        f"no GPU of the catalogue holds it in a server of {_SERVER}: shorten --max-model-len "
        f"{max_model_len}, or divide the model among several servers, which is not planned here"
    ]


def floor_of(
    shape: ModelShape, candidate: Candidate, limit: Limit, sample: LengthSample
) -> Floor | None:
    """The least that a limit's statistic can be on a candidate; None where nothing is known."""
    gpu, config = candidate.choice.gpu, candidate.config
    statistic = limit.statistic or "p50"
    if limit.metric == "ttft":
        tokens = statistic_of(sample.new, statistic)
        return None if tokens is None else first_token_floor(shape, gpu, config, tokens)
    if limit.metric in ("tpot", "itl"):
        if statistic != "mean" and float(np.max(sample.outputs)) < 2:
            return None
        return token_floor(shape, gpu, config)
    if limit.metric == "e2e":
        tokens, answers = (statistic_of(v, statistic) for v in (sample.new, sample.outputs))
        if tokens is None or answers is None:
            return None
        # Neither part alone reaches its quantile where the sum does: their means are a floor.
        first = first_token_floor(shape, gpu, config, float(np.mean(sample.new)))
        each = token_floor(shape, gpu, config)
        mean = first.seconds + (float(np.mean(sample.outputs)) - 1) * each.seconds
        return Floor(mean, each.set_by) if statistic == "mean" else None
    return None


def below_floor(
    shape: ModelShape, options: Iterable[Candidate], slo: Slo, sample: LengthSample
) -> list[str]:
    """Sentences on limits that no candidate can meet, whatever the software."""
    told = []
    fitting = list(options)
    for limit in slo.limits:
        floors = [
            (floor.seconds, candidate.choice.label, floor)
            for candidate in fitting
            if (floor := floor_of(shape, candidate, limit, sample)) is not None
        ]
        if not floors:
            continue
        seconds, label, floor = min(floors, key=lambda f: f[:2])
        if seconds > limit.bound:
            told.append(
                f"{limit.text} is below the physical floor: {label} comes nearest, and takes at "
                f"least {_ms(seconds)} for {floor.set_by}"
            )
    return told


def _fewest(
    shape: ModelShape, gpu: Gpu, max_model_len: int, sample: LengthSample
) -> tuple[int, str] | None:
    """The fewest GPUs, and the method nearest to the checkpoint, that hold a model."""
    methods = ("none",) if shape.stored is not None else _METHODS
    for ranks in TENSOR_PARALLEL_SIZES:
        if shape.obstacle(ranks) is not None or not (
            ranks <= _SERVER or ranks <= gpu.max_link_size
        ):
            continue
        for method in methods:
            if why_not(gpu, method) is not None:
                continue
            choice = Choice(gpu, ranks, method, "auto")
            if candidates(shape, choice, max_model_len, sample)[0].cache is not None:
                return ranks, method
    return None


def _sentence(gpu: Gpu, ranks: int, method: str) -> str:
    weights = "its weights as they are" if method == "none" else f"{method} weights"
    return f"{ranks} {gpu.name} would hold it with {weights}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
