"""From a `config.json` to a `ModelShape`: no weights are needed, and none are read.

One reader for all families. Configs leave out what equals their family's default, so the defaults
that matter stand in `DEFAULTS`; they are those of the families' own configuration classes in
transformers. A config is untrusted: every field is checked for type and size, and what would make
the sums wrong without being noticed is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotune.planning.families import (
    ALIASES,
    BIASED,
    DEFAULTS,
    FOUR_NORMS,
    LEARNED_POSITIONS,
    MODEL_TYPES,
    NORMED_HEADS,
    QKV_BIASED,
    UNGATED,
)
from autotune.planning.layer_patterns import expert_layers, layer_windows
from autotune.planning.model_shape import Experts, LatentAttention, ModelShape
from autotune.planning.stored_weights import stored_weights
from engine.checkpoints.json_file import read_json_object
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields

# Far above any model; below what makes sums slow or unreadable.
_MOST_LAYERS = 4096
_MOST_FEATURES = 1 << 22
_MOST_HEADS = 1 << 16
_MOST_VOCABULARY = 1 << 26
_MOST_EXPERTS = 1 << 14

# Fields of models whose layers are no attention with a growing cache, or whose MLP is described
# elsewhere than where this reader looks.
_OTHER_KINDS = {
    "attn_config": "nested attention settings",
    "attn_type_list": "layers of several kinds of attention",
    "block_configs": "layers of several sizes",
    "ffn_config": "nested expert settings",
    "hybrid_override_pattern": "state-space layers",
    "layers_block_type": "state-space layers",
    "linear_attn_config": "linear attention",
    "linear_num_key_heads": "linear attention",
    "lru_width": "recurrent layers",
    "mamba_d_state": "state-space layers",
    "mamba_state_dim": "state-space layers",
    "num_kv_shared_layers": "layers that share keys and values",
    "ssm_cfg": "state-space layers",
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "use_mla_lite": "another latent attention",
}
_DTYPES = ("float32", "bfloat16", "float16")


def read_shape(model: str | Path) -> ModelShape:
    """The shape that a model folder's `config.json`, or such a file itself, describes.

    Raises:
        ModelError: no such file, not JSON, a field that is missing, of the wrong type or size, or
            a kind of model whose arithmetic is not known here; one sentence.
    """
    if not str(model):
        raise ModelError("no model was given: name a config.json, or the folder that holds one")
    path = Path(model).expanduser()
    try:
        folder, there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a null in it
        folder = there = False
    if not there:
        told = str(model) if len(str(model)) < 200 else f"{str(model)[:200]}..."
        raise ModelError(f"{told!r} does not exist: give a config.json or the folder that holds it")
    file = path / "config.json" if folder else path
    if folder and not file.is_file():
        raise ModelError(f"{path} has no config.json: a plan needs the model's sizes from it")
    if file.suffix == ".gguf":
        # Reading the header takes the reader of the engine, which imports torch.
        from engine.checkpoints.gguf.source import open_gguf

        config, _ = open_gguf(file)
        return shape_of(config, str(file), file.stem)
    name = (path if folder else file.parent).resolve().name
    named = name if folder or file.name == "config.json" else file.stem
    return shape_of(read_json_object(file), str(file), named)


def shape_of(config: dict[str, Any], source: str, name: str) -> ModelShape:
    """The shape that the content of a config.json, read from `source`, describes.

    Raises:
        ModelError: as `read_shape`.
    """
    outer = ConfigFields(config, source)
    fields, notes = _text_part(outer)
    kind = _model_type(outer, fields)
    fields = ConfigFields(_named_alike(fields.values, kind), fields.source)
    if fields.values.get("is_encoder_decoder") is True:
        raise ModelError(f"{source}: an encoder with a decoder; plans are for decoders alone")
    for field, what in _OTHER_KINDS.items():
        if fields.values.get(field):
            raise ModelError(
                f"{fields.source}: {field} says {what}, whose arithmetic is not known here; plans "
                "are for decoders with attention, windows, latent attention and experts"
            )
    hidden = fields.integer("hidden_size", most=_MOST_FEATURES)
    layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    heads = fields.integer("num_attention_heads", most=_MOST_HEADS)
    kv_heads = _kv_heads(fields, kind, heads)
    latent = _latent(fields)
    default_dim = max(hidden // heads, 1)
    head_dim = fields.integer("head_dim", default_dim, most=_MOST_FEATURES)
    if latent is not None:
        head_dim = latent.nope_dim + latent.rope_dim
    intermediate = _intermediate_size(fields, kind, hidden)
    experts = _experts(fields, kind, layers, intermediate)
    if kind == "llama4_text":  # there the plain name is the experts' size
        intermediate = fields.integer("intermediate_size_mlp", intermediate, most=_MOST_FEATURES)
    longest = _max_position(fields)
    biased = fields.boolean("attention_bias", kind in BIASED)
    if fields.has("index_topk"):
        notes += (
            f"{fields.source}: attention that chooses its tokens (index_topk) is planned for as "
            "attention to all of them",
        )
    names = outer.values.get("architectures")
    named = names[0] if isinstance(names, list) and names else kind or "unknown"
    return ModelShape(
        name=name,
        architecture=str(named)[:80],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", most=_MOST_VOCABULARY),
        max_position=longest,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        dtype=_dtype(fields, stored=stored_weights(config) is not None),
        layer_windows=layer_windows(fields, kind, layers),
        gated=kind not in UNGATED,
        qkv_bias=biased or kind in QKV_BIASED,
        output_bias=biased,
        mlp_bias=fields.boolean("mlp_bias", kind in BIASED or kind == "gpt_oss"),
        norms=_norms(kind, hidden, head_dim, latent),
        position_embeddings=longest if kind in LEARNED_POSITIONS else 0,
        latent=latent,
        experts=experts,
        stored=stored_weights(config) or stored_weights(fields.values),
        notes=notes,
    )


def _intermediate_size(fields: ConfigFields, kind: str, hidden: int) -> int:
    if kind in UNGATED and not fields.has("intermediate_size"):
        return 4 * hidden
    return fields.integer("intermediate_size", most=_MOST_FEATURES)


def _text_part(outer: ConfigFields) -> tuple[ConfigFields, tuple[str, ...]]:
    """The part of a config that describes the text model, and what is left aside."""
    for name in ("text_config", "llm_config", "language_config"):
        text = outer.mapping(name)
        if text is None:
            continue
        inherited = {
            field: outer.values[field]
            for field in ("dtype", "torch_dtype", "tie_word_embeddings")
            if outer.has(field) and not text.has(field)
        }
        note = (
            f"{outer.source} describes a model that also sees or hears; the text model in {name} "
            "is planned for, without the memory and the time of the rest"
        )
        return ConfigFields({**text.values, **inherited}, text.source), (note,)
    return outer, ()


def _model_type(outer: ConfigFields, fields: ConfigFields) -> str:
    for source in (fields.values, outer.values):
        kind = source.get("model_type")
        if isinstance(kind, str) and kind:
            return kind
    names = outer.values.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return MODEL_TYPES.get(first, "") if isinstance(first, str) else ""


def _named_alike(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields under one name each, and the family's defaults for those that are absent."""
    known = {name: value for name, value in values.items() if value is not None}
    for name, others in ALIASES.items():
        found = next((known[other] for other in others if other in known), None)
        if name not in known and found is not None:
            known[name] = found
    # Null stays null where a default would say something else.
    nulls = {name: None for name, value in values.items() if value is None}
    return {**DEFAULTS.get(kind, {}), **nulls, **known}


def _kv_heads(fields: ConfigFields, kind: str, heads: int) -> int:
    if kind in ("falcon", "gpt_bigcode") and fields.boolean("multi_query", True):
        newer = fields.boolean("new_decoder_architecture", False)
        count = fields.integer("num_key_value_heads", heads, most=_MOST_HEADS) if newer else 1
    else:
        count = fields.integer("num_key_value_heads", heads, most=_MOST_HEADS)
    if heads % count:
        raise ModelError(
            f"{fields.source}: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={count}"
        )
    return count


def _latent(fields: ConfigFields) -> LatentAttention | None:
    if not fields.has("kv_lora_rank"):
        return None

    def size(name: str) -> int:
        return fields.integer(name, most=_MOST_FEATURES)

    return LatentAttention(
        kv_rank=size("kv_lora_rank"),
        rope_dim=size("qk_rope_head_dim"),
        nope_dim=size("qk_nope_head_dim"),
        value_dim=size("v_head_dim"),
        query_rank=size("q_lora_rank") if fields.has("q_lora_rank") else 0,
    )


def _experts(fields: ConfigFields, kind: str, layers: int, intermediate: int) -> Experts | None:
    if not fields.values.get("num_experts"):
        unread = [n for n, v in fields.values.items() if "expert" in n and type(v) is int and v > 1]
        if unread and "num_experts_per_tok" not in unread:
            raise ModelError(
                f"{fields.source}: {unread[0]}={fields.values[unread[0]]} speaks of experts, but "
                "no field says how many there are: num_experts, n_routed_experts or "
                "num_local_experts"
            )
        return None
    count = fields.integer("num_experts", most=_MOST_EXPERTS)
    if count == 1:
        return None
    size = fields.integer("moe_intermediate_size", intermediate, most=_MOST_FEATURES)
    if not fields.has("num_experts_per_tok"):
        raise ModelError(f"{fields.source}: num_experts_per_tok is missing, of {count} experts")
    has = expert_layers(fields, layers)
    if not any(has):
        return None
    if fields.has("shared_expert_intermediate_size"):
        shared = fields.integer("shared_expert_intermediate_size", most=_MOST_FEATURES)
    else:
        number = fields.values.get("n_shared_experts")
        shared = size * fields.integer("n_shared_experts", most=_MOST_EXPERTS) if number else 0
    return Experts(
        num_experts=count,
        top_k=fields.integer("num_experts_per_tok", most=count),
        intermediate_size=size,
        layers=has,
        shared_size=shared,
        shared_gate=kind == "qwen2_moe",
    )


def _max_position(fields: ConfigFields) -> int:
    """Tokens of the longest sequence; YaRN's scaling reaches `factor` times the original length."""
    longest = fields.integer("max_position_embeddings", 2048)
    for name in ("rope_parameters", "rope_scaling"):
        scaling = fields.values.get(name)
        if not isinstance(scaling, dict):
            continue
        if scaling.get("rope_type", scaling.get("type")) != "yarn":
            continue
        rope = ConfigFields(scaling, f"{fields.source}: {name}")
        original = rope.integer(
            "original_max_position_embeddings",
            fields.integer("original_max_position_embeddings", longest),
        )
        reach = original * rope.number("factor", 1.0)
        if reach >= 1 << 62:
            raise ModelError(f"{rope.source}: factor={rope.number('factor')} is too large")
        return max(longest, int(reach))
    return longest


def _dtype(fields: ConfigFields, *, stored: bool) -> str:
    dtype = fields.text("dtype", fields.text("torch_dtype", "bfloat16" if stored else "float32"))
    dtype = dtype.removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ModelError(
            f"{fields.source}: dtype {dtype[:40]!r} is not known; {', '.join(_DTYPES)} are"
        )
    return dtype


def _norms(kind: str, hidden: int, head_dim: int, latent: LatentAttention | None) -> int:
    norms = hidden * (4 if kind in FOUR_NORMS else 2)
    if kind in BIASED:
        norms *= 2
    if kind in NORMED_HEADS:
        norms += 2 * head_dim
    if latent is not None:
        norms += latent.kv_rank + latent.query_rank
    return norms
