"""Which layers of a model have a window, and which have experts, by the fields of its config."""

from __future__ import annotations

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields

_FULL = "full_attention"
_SLIDING = ("sliding_attention", "chunked_attention")
# Every so many layers one sees all; the others have a window.
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
_WINDOWED_BY_DEFAULT = {
    "mistral": 4096,
    "gemma2": 4096,
    "gemma3": 4096,
    "gemma3_text": 4096,
    "cohere2": 4096,
    "gpt_oss": 128,
}
# All layers have the window of the config, if it has one.
_ALL_LAYERS = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")


def layer_windows(fields: ConfigFields, kind: str, layers: int) -> tuple[int, ...]:
    """For each layer the tokens that a token sees, itself included; 0 means all.

    A family that is not known to use its `sliding_window` is taken to see everything, which
    overstates what it reads and caches.

    Raises:
        ModelError: a kind of layer that has no cache of keys and values, or a bad field.
    """
    if kind == "llama4_text":
        return _chunked(fields, layers)
    window = fields.integer_or_off("sliding_window", _WINDOWED_BY_DEFAULT.get(kind, 0) or 1)
    if not fields.has("sliding_window") and kind not in _WINDOWED_BY_DEFAULT:
        window = 0
    if "use_sliding_window" in fields.values or kind.startswith(("qwen2", "qwen3")):
        window = window if fields.boolean("use_sliding_window", False) else 0
        first = fields.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ModelError(f"{fields.source}: max_window_layers must be a layer, got {first!r}")
        first = 0 if kind == "qwen3_moe" else first
        slides = tuple(bool(window) and index >= first for index in range(layers))
    elif kind in _PERIODS:
        period = fields.integer("sliding_window_pattern", _PERIODS[kind])
        slides = tuple((index + 1) % period != 0 for index in range(layers))
    else:
        slides = (kind in _ALL_LAYERS,) * layers
    kinds = _kinds(fields, layers)
    if kinds is not None:
        slides = tuple(k in _SLIDING for k in kinds)
        if any(slides) and not window:
            raise ModelError(
                f"{fields.source}: layer_types names {_SLIDING[0]} but sliding_window is null"
            )
    return tuple(window if slide else 0 for slide in slides)


def expert_layers(fields: ConfigFields, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts in place of an MLP.

    Raises:
        ModelError: a bad field.
    """
    dense_first = _count(fields, "first_k_dense_replace") or _count(fields, "moe_layer_start_index")
    plain = fields.indices("mlp_only_layers")
    listed = fields.values.get("moe_layer_freq")
    if isinstance(listed, list):
        if len(listed) != layers or not all(v in (0, 1) for v in listed):
            raise ModelError(f"{fields.source}: moe_layer_freq must say 0 or 1 for {layers} layers")
        return tuple(v == 1 for v in listed)
    every = fields.integer("moe_layer_freq", 1)
    step = fields.integer("decoder_sparse_step", fields.integer("interleave_moe_layer_step", 1))
    return tuple(
        index >= dense_first
        and index not in plain
        and index % every == 0
        and (index + 1) % step == 0
        for index in range(layers)
    )


def _chunked(fields: ConfigFields, layers: int) -> tuple[int, ...]:
    """Llama 4: layers with rotary embeddings see their chunk, every fourth one everything."""
    chunk = (
        fields.integer("attention_chunk_size", 8192) if fields.has("attention_chunk_size") else 0
    )
    rope = fields.values.get("no_rope_layers") or [
        int((index + 1) % 4 != 0) for index in range(layers)
    ]
    if not isinstance(rope, list) or len(rope) != layers:
        raise ModelError(f"{fields.source}: no_rope_layers must say 0 or 1 for {layers} layers")
    return tuple(chunk if has else 0 for has in rope)


def _kinds(fields: ConfigFields, layers: int) -> list[str] | None:
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"{fields.source}: layer_types must be a list of {layers} texts")
    for kind in kinds:
        if kind != _FULL and kind not in _SLIDING:
            raise ModelError(
                f"{fields.source}: layer_types holds {str(kind)[:40]!r}, whose arithmetic is not "
                f"known here; {_FULL} and {' and '.join(_SLIDING)} are"
            )
    return kinds


def _count(fields: ConfigFields, name: str) -> int:
    value = fields.values.get(name, 0)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise ModelError(f"{fields.source}: {name} must be a number of layers, got {value!r}")
    return value
