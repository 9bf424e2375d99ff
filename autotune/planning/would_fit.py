"""Where nothing holds a model: what would."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.hardware.catalogue import Catalogue, Gpu
from autotune.planning.candidates import Choice, candidates
from autotune.planning.methods_run import why_not
from autotune.planning.model_shape import ModelShape
from autotune.planning.options import TENSOR_PARALLEL_SIZES
from autotune.planning.planned_traffic import LengthSample

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
