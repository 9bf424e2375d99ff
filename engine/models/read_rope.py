"""The rotary embedding of a config, in each of the ways that configs have spelled it."""

from __future__ import annotations

import dataclasses
import math

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.spec import RopeSpec

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_KNOWN = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
}


def read_rope(
    fields: ConfigFields, head_dim: int, max_position: int, theta: float
) -> tuple[RopeSpec, int]:
    """The rotary embedding that all layers share, and the longest sequence in tokens.

    transformers 5 writes everything into `rope_parameters`; before, `rope_theta` stood beside
    `rope_scaling`, whose kind was first called `type` and then `rope_type`. `theta` is the base
    where none is named.

    `max_position` is what `max_position_embeddings` says. YaRN's scaling reaches `factor` times the
    original length, which configs that were extended by hand do not repeat there.

    Raises:
        ModelError: a kind of scaling that is not supported, or a bad field.
    """
    theta = fields.number("rope_theta", theta)
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    fields.seen.add("rope_scaling")
    fraction = fields.number("partial_rotary_factor", 1.0)
    original = fields.integer("original_max_position_embeddings", max_position)
    if scaling is None:
        return _checked(RopeSpec(theta, fraction=fraction), head_dim, fields), max_position
    if not fields.has("original_max_position_embeddings"):
        original = scaling.integer("original_max_position_embeddings", max_position)
    scaled = read_scaling(scaling, head_dim, max_position, original, theta, fraction)
    if scaled.kind == "yarn":
        longest = original * scaled.factor
        if not math.isfinite(longest):
            raise ModelError(f"{scaling.source}: factor={scaled.factor} is too large")
        max_position = max(max_position, int(longest))
    return scaled, max_position


def read_scaling(
    scaling: ConfigFields,
    head_dim: int,
    max_position: int,
    original: int,
    theta: float,
    fraction: float = 1.0,
) -> RopeSpec:
    """One object of rotary parameters; `original` is the length in tokens before scaling.

    Raises:
        ModelError: a kind of scaling that is not supported, or a bad field.
    """
    unknown = sorted(name for name in scaling.values if name not in _KNOWN and scaling.has(name))
    if unknown:
        raise ModelError(f"{scaling.source}: {', '.join(unknown)} is not supported")
    rope = RopeSpec(
        theta=scaling.number("rope_theta", theta),
        fraction=scaling.number("partial_rotary_factor", fraction),
    )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in KINDS:
        raise ModelError(
            f"{scaling.source}: rope_type {kind!r} is not supported; {', '.join(KINDS)} are"
        )
    _checked(rope, head_dim, scaling)
    # Dynamic scaling leaves frequencies alone up to the model's length, and longer is not served.
    if kind in ("default", "dynamic"):
        return rope
    if kind == "linear":
        return dataclasses.replace(rope, kind=kind, factor=scaling.number("factor"))
    rope = dataclasses.replace(rope, kind=kind, original_max_position=original)
    if kind == "llama3":
        return _llama3(rope, scaling)
    if kind == "yarn":
        return _yarn(rope, scaling, max_position)
    return _longrope(rope, scaling, head_dim, max_position)


def _checked(rope: RopeSpec, head_dim: int, fields: ConfigFields) -> RopeSpec:
    turned = rope.rotary_dim(head_dim)
    if rope.fraction > 1 or turned < 2 or turned % 2:
        raise ModelError(
            f"{fields.source}: partial_rotary_factor={rope.fraction} must leave an even number of "
            f"a head's {head_dim} elements to turn"
        )
    return rope


def _llama3(rope: RopeSpec, scaling: ConfigFields) -> RopeSpec:
    rope = dataclasses.replace(
        rope,
        factor=scaling.number("factor"),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(f"{scaling.source}: low_freq_factor must be below high_freq_factor")
    return rope


def _yarn(rope: RopeSpec, scaling: ConfigFields, max_position: int) -> RopeSpec:
    """Peng et al. 2023; the two `mscale` fields are DeepSeek's refinement of its temperature."""
    factor = scaling.number("factor", max_position / rope.original_max_position)

    def temperature(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    betas = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if rope.theta <= 1 or not all(1e-6 <= beta <= 1e6 for beta in betas):
        raise ModelError(
            f"{scaling.source}: yarn needs a rope_theta above 1, and beta_fast and beta_slow "
            f"between 1e-6 and 1e6, got {rope.theta:g}, {betas[0]:g} and {betas[1]:g}"
        )
    mscale, all_dim = scaling.number_or_off("mscale", 0), scaling.number_or_off("mscale_all_dim", 0)
    derived = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature()
    return dataclasses.replace(
        rope,
        factor=factor,
        beta_fast=betas[0],
        beta_slow=betas[1],
        truncate=scaling.boolean("truncate", True),
        attention_factor=scaling.number("attention_factor", derived),
    )


def _longrope(rope: RopeSpec, scaling: ConfigFields, head_dim: int, max_position: int) -> RopeSpec:
    """Ding et al. 2024, as Phi-3 has it."""
    pairs = rope.rotary_dim(head_dim) // 2
    original = rope.original_max_position
    factor = scaling.number("factor", max_position / original)
    if original < 2:
        raise ModelError(f"{scaling.source}: original_max_position_embeddings must be at least 2")
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return dataclasses.replace(
        rope,
        factor=factor,
        short_factor=scaling.numbers("short_factor", pairs),
        long_factor=scaling.numbers("long_factor", pairs),
        attention_factor=scaling.number("attention_factor", derived),
    )
