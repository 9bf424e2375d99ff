"""The metadata of a GGUF file, told as the `config.json` of the same architecture."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.gguf.file import GgufFile
from engine.errors import ModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
# Types whose weights are floats; a file in which others prevail computes in bfloat16.
_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """A config in Hugging Face's names.

    `dtype` is the type of the matrices if they are floats, else bfloat16, since the values that
    blocks stand for have no more than 8 bits beside their scale.

    Raises:
        ModelError: an architecture that is not read, or metadata missing or of a wrong type.
    """
    meta = _Metadata(file)
    if meta.has("split.count") and meta.integer("split.count") > 1:
        raise ModelError(
            f"{file.path} is one of {meta.integer('split.count')} parts of a split GGUF model: "
            "merge them into one file first"
        )
    name = meta.text("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: GGUF architecture {name!r} is not read; {', '.join(ARCHITECTURES)} are"
        )
    if meta.has(f"{name}.expert_count") and meta.integer(f"{name}.expert_count"):
        raise ModelError(
            f"{file.path}: GGUF files of mixtures of experts are not read: give the model as "
            "safetensors"
        )
    hidden, heads = (
        meta.integer(f"{name}.embedding_length"),
        meta.integer(f"{name}.attention.head_count"),
    )
    head_dim = meta.integer(f"{name}.attention.key_length", hidden // max(heads, 1))
    rotary = meta.integer(f"{name}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ModelError(
            f"{file.path}: {name}.rope.dimension_count={rotary} differs from the head size of "
            f"{head_dim}, which is not read"
        )
    length = meta.integer(f"{name}.context_length", 2048)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "hidden_size": hidden,
        "intermediate_size": meta.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": meta.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": meta.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-5),
        "max_position_embeddings": length,
        "vocab_size": _vocab_size(file, meta, name),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "dtype": _dtype(file),
        "rope_parameters": _rope(file, meta, name, length),
        "attention_bias": name == "llama" and "blk.0.attn_q.bias" in file.tensors,
    }
    for key, field in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if meta.has(f"tokenizer.ggml.{key}_token_id"):
            config[field] = meta.integer(f"tokenizer.ggml.{key}_token_id")
    # Chat models end a turn with another token than a text.
    if meta.has("tokenizer.ggml.eot_token_id") and "eos_token_id" in config:
        config["eos_token_id"] = sorted(
            {config["eos_token_id"], meta.integer("tokenizer.ggml.eot_token_id")}
        )
    return config


def _rope(file: GgufFile, meta: _Metadata, name: str, length: int) -> dict[str, Any]:
    theta = meta.number(f"{name}.rope.freq_base", 10000.0)
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        # Llama 3.1's scaling comes as a divisor of each frequency, as longrope's factors are.
        values = factors.type.floats(file.rows(factors)).flatten().tolist()
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": values,
            "long_factor": values,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }
    kind = meta.text(f"{name}.rope.scaling.type", "none")
    if kind in ("none", "default"):
        return {"rope_type": "default", "rope_theta": theta}
    rope = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": meta.number(f"{name}.rope.scaling.factor", 1.0),
    }
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.integer(
            f"{name}.rope.scaling.original_context_length", length
        )
    elif kind != "linear":
        raise ModelError(
            f"{file.path}: {name}.rope.scaling.type {kind!r} is not read; none, linear and yarn are"
        )
    return rope


def _vocab_size(file: GgufFile, meta: _Metadata, name: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    return meta.integer(f"{name}.vocab_size")


def _dtype(file: GgufFile) -> str:
    kinds = {info.type.name for info in file.tensors.values() if len(info.shape) > 1}
    floats = {_FLOAT_DTYPES[kind] for kind in kinds if kind in _FLOAT_DTYPES}
    return floats.pop() if len(floats) == 1 and kinds <= set(_FLOAT_DTYPES) else "bfloat16"


class _Metadata:
    """Typed access to metadata; what is raised names file and key."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def has(self, key: str) -> bool:
        return key in self._file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 0:
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self._file.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self._file.path}: GGUF metadata {key!r} is missing")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> ModelError:
        shown = repr(value)[:60]
        return ModelError(f"{self._file.path}: GGUF metadata {key!r} must be {wanted}, got {shown}")
