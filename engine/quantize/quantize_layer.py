"""One block's floats and the statistics of its inputs -> a form for each linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.spec import DecoderSpec
from engine.quantize.awq import AwqOptions, quantize_clipped, search_scales
from engine.quantize.folding import Fold, LayerFloats, layer_folds
from engine.quantize.forms import Int8ChannelForm, LinearForm
from engine.quantize.fp8 import quantize_fp8
from engine.quantize.gptq import GptqOptions, quantize_gptq
from engine.quantize.method_table import METHODS
from engine.quantize.methods import quantize_weight, require_finite
from engine.quantize.rtn import quantize_groups, quantize_int8
from engine.quantize.smoothquant import MIGRATION_STRENGTH, smoothing_scales
from engine.quantize.statistics import InputStatistics
from engine.quantize.stored_scales import with_stored_scales
from engine.quantize.wanda import prune_2_of_4
from engine.quantize.weight_size import int4_group_size

Sparsity = Literal["none", "2:4"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method of `METHODS` and its settings.

    `bits` (4 or 8), `group_size` and `symmetric` are those of the methods of weights in groups:
    int4, gptq and awq. Where no group of this size divides a layer's columns a smaller one is
    taken, by halving, and int8 by channel below 16. With `sparsity` "2:4" weights are pruned first.
    FP8 has its scales by channel or by tensor. With `scale_dtype` all scales are of its values, as
    a checkpoint stores them.

    Raises:
        ConfigError: an unknown method, bits, group size or sparsity.
    """

    method: str
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    activation_order: bool = True
    damping: float = 0.01
    migration_strength: float = MIGRATION_STRENGTH
    sparsity: Sparsity = "none"
    fp8_scale_of: Literal["channel", "tensor"] = "channel"
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.bits not in (4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {self.bits}")
        if self.group_size not in (16, 32, 64, 128, 256):
            raise ConfigError(f"group_size must be 16, 32, 64, 128 or 256, got {self.group_size}")
        if self.sparsity not in ("none", "2:4"):
            raise ConfigError(f"sparsity must be none or 2:4, got {self.sparsity!r}")

    @property
    def needs_inputs(self) -> bool:
        """Whether a text must go through the model."""
        return METHODS[self.method].calibrated or self.sparsity != "none"

    @property
    def needs_gram(self) -> bool:
        """Whether second moments of the inputs are needed."""
        return self.method in ("gptq", "awq")


def quantize_layer(
    spec: DecoderSpec,
    floats: LayerFloats,
    statistics: dict[str, InputStatistics],
    recipe: Recipe,
    notes: list[str],
) -> dict[str, LinearForm]:
    """The forms by the prefix of each linear layer; folding changes `floats`, `notes` grows.

    `statistics` are by the names of `layer_linears`, empty where the recipe needs none.

    Raises:
        ModelError: NaN or infinity in a weight.
    """
    for prefix, weight in floats.weights.items():
        try:
            require_finite(weight)
        except ValueError as error:
            raise floats.problem(f"{prefix}.weight", f"is of no use: {error}") from error
    if recipe.needs_inputs:
        unseen = [name for name in floats.linears if name not in statistics]
        if unseen:
            notes.append(
                f"no calibration token reached {', '.join(unseen)}: rounded to nearest instead"
            )
    keep = _prune(floats, statistics, notes) if recipe.sparsity == "2:4" else {}
    applied: dict[str, Tensor] = {}
    if recipe.method in ("awq", "smoothquant"):
        for fold in layer_folds(spec, floats.linears):
            if fold.consumer in statistics:
                applied[fold.consumer] = _fold(floats, fold, statistics[fold.consumer], recipe)
        if spec.experts is not None and "gate_up" not in floats.linears:
            notes.append("the experts' gate and up keep their channels' scales: they share a norm")
    forms: dict[str, LinearForm] = {}
    for name, parts in floats.linears.items():
        gram = statistics[name].gram if name in statistics else None
        if gram is not None and name in applied:
            gram = gram / applied[name] / applied[name][:, None]
        for prefix in parts.prefixes:
            forms[prefix] = _quantize(floats.weights[prefix], gram, recipe, keep.get(prefix))
    return forms


def _prune(
    floats: LayerFloats, statistics: dict[str, InputStatistics], notes: list[str]
) -> dict[str, Tensor]:
    """Prune the weights; the masks of what stays, by prefix."""
    keep: dict[str, Tensor] = {}
    for name, parts in floats.linears.items():
        if name not in statistics:
            continue
        if parts.columns % 4:
            notes.append(f"{name} is not pruned: 4 does not divide its {parts.columns} columns")
            continue
        for prefix in parts.prefixes:
            pruned = prune_2_of_4(floats.weights[prefix], statistics[name].norms)
            floats.weights[prefix] = pruned
            keep[prefix] = pruned != 0
    return keep


def _fold(floats: LayerFloats, fold: Fold, statistics: InputStatistics, recipe: Recipe) -> Tensor:
    prefixes = floats.linears[fold.consumer].prefixes
    weights = [floats.weights[prefix] for prefix in prefixes]
    if recipe.method == "smoothquant":
        scales = smoothing_scales(weights, statistics.largest, recipe.migration_strength)
        return floats.fold(fold, fold.tie(scales, largest=True))
    assert statistics.gram is not None
    size = int4_group_size(weights[0].shape[1], recipe.group_size)
    if size is None:
        return floats.fold(fold, statistics.mean_abs.new_ones(weights[0].shape[1]))
    options = AwqOptions(recipe.bits, size, recipe.symmetric)
    mean_abs = fold.tie(statistics.mean_abs)
    return floats.fold(fold, search_scales(weights, statistics.gram, mean_abs, options))


def _quantize(
    weight: Tensor, gram: Tensor | None, recipe: Recipe, keep: Tensor | None
) -> LinearForm:
    form = _rounded(weight, gram, recipe, keep)
    if recipe.scale_dtype is None:
        return form
    again = recipe.method != "gptq" or gram is None
    return with_stored_scales(form, weight, recipe.scale_dtype, requantize=again)


def _rounded(
    weight: Tensor, gram: Tensor | None, recipe: Recipe, keep: Tensor | None
) -> LinearForm:
    if recipe.method == "fp8":
        return quantize_fp8(weight, recipe.fp8_scale_of)
    if recipe.method == "smoothquant":
        return Int8ChannelForm(*quantize_int8(weight))
    if recipe.method not in ("int4", "gptq", "awq"):
        return quantize_weight(weight, recipe.method)
    size = int4_group_size(weight.shape[1], recipe.group_size)
    if size is None:
        return Int8ChannelForm(*quantize_int8(weight))
    if recipe.method == "int4" or gram is None:
        return quantize_groups(weight, size, recipe.bits, recipe.symmetric)
    if recipe.method == "awq":
        return quantize_clipped(weight, gram, AwqOptions(recipe.bits, size, recipe.symmetric))
    options = GptqOptions(
        bits=recipe.bits,
        group_size=size,
        symmetric=recipe.symmetric,
        damping=recipe.damping,
        activation_order=recipe.activation_order,
    )
    return quantize_gptq(weight, gram, options, keep)
