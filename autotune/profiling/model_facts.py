"""A model's arithmetic from its config alone, as an engine config would serve it.

Nothing is loaded: a model that does not fit this machine has facts too. Where weights are there,
their format is read from the headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.model_info import ModelInfo, read_model_info, with_default_model
from autotune.profiling.schema import ModelFacts
from engine.checkpoints.gguf.file import GgufFile
from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.kv_cache import cache_bytes, cache_dtype, kv_bytes_per_token
from engine.loading import resolve_dtype, resolve_max_model_len
from engine.models.registry import decoder_spec
from engine.models.sharding import Shard
from engine.models.spec import DecoderSpec
from engine.models.tensors import Root, layer_linears
from engine.quantize.method_table import METHODS
from engine.quantize.weight_size import linear_bytes

_SCALE_BYTES = 2  # of a checkpoint that is quantized already; float16, beside them zeros


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a checkpoint's linear layers are quantized: bits of an element, columns of a group."""

    title: str
    bits: float
    group_size: int | None = None

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of one weight with its scales; zeros take as many bits as an element."""
        groups = -(-columns // self.group_size) if self.group_size else 1
        scales = rows * groups * (_SCALE_BYTES + (self.bits / 8 if self.group_size else 0.0))
        return round(rows * columns * self.bits / 8 + scales)


def model_facts(config: EngineConfig) -> ModelFacts:
    """What serving this model takes, under this config; without a model the embedded one.

    Sizes are of the whole model, over all its ranks together. KV bytes of a token are those of all
    layers; key/value heads that several ranks hold count as often as they are held.

    Raises:
        engine.errors.EngineError: no such model, an unreadable one, or an impossible config.
    """
    config = with_default_model(config)
    folder = open_model_folder(config.model)
    spec = decoder_spec(folder)
    dtype = resolve_dtype(config, spec)
    info = _info(config)
    stored = None if config.quantization != "none" else _stored(folder, info)
    sizes = _sizes(spec, config.quantization, stored, dtype.itemsize)
    cache = cache_dtype(config, dtype)
    ranks = config.tensor_parallel_size
    held = ranks * len(Shard(0, ranks).kv_heads(spec.num_kv_heads)) / spec.num_kv_heads
    method = METHODS[config.quantization]
    max_model_len = resolve_max_model_len(config, spec)
    float_bits = 8 * dtype.itemsize
    bits = stored.bits if stored else float_bits if method.name == "none" else method.weight_bits
    names = folder.config.get("architectures")
    return ModelFacts(
        name=info.name if info else folder.path.resolve().name,
        path=str(folder.path.resolve()),
        architecture=info.architecture if info else str(names[0]) if names else None,
        parameters=spec.num_parameters,
        matmul_parameters=sizes.met_by_a_token,
        head_parameters=spec.vocab_size * spec.hidden_size,
        weight_bytes=sizes.read,
        resident_bytes=sizes.resident,
        kv_bytes_per_token=kv_bytes_per_token(spec, cache) * held,
        attention_features=spec.num_heads * spec.head_dim * spec.num_layers,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        weight_bits=round(bits),
        dtype=str(dtype).removeprefix("torch."),
        quantization=method.name if method.name != "none" else stored.title if stored else None,
        has_experts=spec.experts is not None,
        has_windows=any(spec.layer_windows),
        fingerprint=info.fingerprint if info else None,
        num_experts=spec.experts.num_experts if spec.experts else 0,
        experts_per_token=_top_k(spec),
        expert_bytes=sizes.experts,
        head_bytes=sizes.head,
        kv_block_bytes=cache_bytes(config, spec, dtype, max_model_len, 1) * held,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    met_by_a_token: int
    read: int
    resident: int
    experts: int
    head: int


def _sizes(spec: DecoderSpec, method: str, stored: _Stored | None, dtype_bytes: int) -> _Sizes:
    """Parameters that a token meets in matrix products, and bytes read and resident.

    Of a layer with experts a token meets `top_k` of them and the router; read and resident are all.
    """

    def matrix_bytes(rows: int, columns: int) -> int:
        if stored is not None:
            return stored.bytes(rows, columns)
        return linear_bytes(rows, columns, method, dtype_bytes)

    root = Root(*spec.roots[0])
    met = linear = matrix = experts = 0
    for index in range(spec.num_layers):
        for name, parts in layer_linears(spec, root, index).items():
            rows = sum(parts.rows)
            matrix += rows * parts.columns
            taken = matrix_bytes(rows, parts.columns)
            linear += taken
            experts += taken if name.startswith("experts.") else 0
            if not name.startswith("experts.") or int(name.split(".")[1]) < _top_k(spec):
                met += rows * parts.columns
        if spec.has_experts(index) and spec.experts is not None:
            met += spec.experts.num_experts * spec.hidden_size  # the router
    head = spec.vocab_size * spec.hidden_size
    tied = spec.tie_word_embeddings
    # Norms, biases and routers stay in floats.
    rest = (spec.num_parameters - matrix - head * (1 if tied else 2)) * dtype_bytes
    # A quantized head is a copy of its own, also where it is tied; that of a checkpoint which is
    # quantized already stays in floats as a rule.
    head_bytes = (
        head * dtype_bytes
        if method == "none"
        else linear_bytes(spec.vocab_size, spec.hidden_size, "int8", dtype_bytes)
    )
    read = linear + rest + head_bytes
    shared = tied and method == "none"
    resident = linear + rest + head_bytes + (0 if shared else head * dtype_bytes)
    return _Sizes(met, read, resident, experts, head_bytes)


def _top_k(spec: DecoderSpec) -> int:
    return spec.experts.top_k if spec.experts is not None else 0


def _info(config: EngineConfig) -> ModelInfo | None:
    """What the folder with its weights tells; None where they are missing."""
    try:
        return read_model_info(config)
    except EngineError:
        return None


def _stored(folder: ModelFolder, info: ModelInfo | None) -> _Stored | None:
    """How the checkpoint's own linear layers are quantized; None if they are floats."""
    if folder.path.is_file():
        return _gguf(folder)
    fields = folder.config.get("quantization_config")
    if not isinstance(fields, dict):
        return None
    bits, group = _bits(fields)
    if bits is None:
        return None
    method = str(fields.get("quant_method", "quantized"))
    title = info.quantization if info and info.quantization else f"{method} {bits} bits"
    return _Stored(title, bits, group)


def _bits(fields: dict[str, Any]) -> tuple[int | None, int | None]:
    """Bits and group size of a `quantization_config`; group size None for scales by channel."""
    method = fields.get("quant_method")
    if method == "fp8" or fields.get("load_in_8bit"):
        return 8, None
    if fields.get("load_in_4bit"):
        return 4, 64
    groups = fields.get("config_groups")
    if isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, dict) else None
        fields = weights if isinstance(weights, dict) else {}
    bits = next((fields[n] for n in ("bits", "w_bit", "num_bits") if n in fields), None)
    size = next((fields[n] for n in ("group_size", "q_group_size") if n in fields), None)
    valid = type(bits) is int and 1 <= bits <= 16
    return (bits if valid else None), (size if type(size) is int and size > 0 else None)


def _gguf(folder: ModelFolder) -> _Stored | None:
    """Mean bits of the matrices of a GGUF file, embeddings and head excluded."""
    tensors = [
        t
        for t in GgufFile(folder.path).tensors.values()
        if len(t.shape) == 2 and t.name.startswith("blk.")
    ]
    elements = sum(t.shape[0] * t.shape[1] for t in tensors)
    if not elements or all(t.type.name in ("F32", "F16", "BF16") for t in tensors):
        return None
    bits = 8 * sum(t.nbytes for t in tensors) / elements
    kinds = sorted({t.type.name for t in tensors})
    return _Stored(f"gguf {' and '.join(kinds)}", bits)
