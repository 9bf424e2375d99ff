"""Which tensors of a checkpoint each part of the decoder is made of; names are Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass

from engine.checkpoints.source import TensorSource
from engine.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class LinearParts:
    """The linear layers of a checkpoint that one of the decoder is made of, their rows stacked.

    `prefixes` name them ("model.layers.0.self_attn.q_proj"), `rows` are their output features and
    `columns` the input features that they share. `bias` says whether all of them have one.
    """

    prefixes: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Root:
    """Prefixes of the model ("model") and of its output head ("lm_head") in a checkpoint."""

    model: str
    head: str

    @classmethod
    def find(cls, spec: DecoderSpec, source: TensorSource) -> Root:
        """The first of the family's roots whose embeddings `source` has, or just the first."""
        for model, head in spec.roots:
            if f"{model}.embed_tokens.weight" in source:
                return cls(model, head)
        return cls(*spec.roots[0])

    @property
    def embedding(self) -> str:
        """Prefix of the embeddings."""
        return f"{self.model}.embed_tokens"

    @property
    def final_norm(self) -> str:
        """Name of the last norm's weight."""
        return f"{self.model}.norm.weight"

    def layer(self, index: int) -> str:
        """Prefix of one layer."""
        return f"{self.model}.layers.{index}"


def layer_linears(spec: DecoderSpec, root: Root, index: int) -> dict[str, LinearParts]:
    """The linear layers of one block, by the names under which `run_block` shows their inputs.

    These are qkv, output, and gate_up and down, or with experts experts.<i>.gate_up and
    experts.<i>.down. A router is none of them: it is small, never quantized and read as it is.
    """
    layer = root.layer(index)
    hidden, (q, k, v) = spec.hidden_size, spec.qkv_sizes
    attention = f"{layer}.self_attn"
    parts = {
        "qkv": LinearParts(
            (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            (q, k, v),
            hidden,
            spec.qkv_bias,
        ),
        "output": LinearParts((f"{attention}.o_proj",), (hidden,), q, spec.output_bias),
    }
    if spec.fused_tensors:
        parts["qkv"] = LinearParts((f"{attention}.qkv_proj",), (q + k + v,), hidden, spec.qkv_bias)
    if spec.experts is None or not spec.has_experts(index):
        return parts | _mlp(spec, layer)
    inner, (gate, up, down) = spec.experts.intermediate_size, spec.experts.parts
    for expert in range(spec.experts.num_experts):
        prefix = f"{layer}.{spec.experts.block}.experts.{expert}"
        parts[f"experts.{expert}.gate_up"] = LinearParts(
            (f"{prefix}.{gate}", f"{prefix}.{up}"), (inner, inner), hidden
        )
        parts[f"experts.{expert}.down"] = LinearParts((f"{prefix}.{down}",), (hidden,), inner)
    return parts


def router(spec: DecoderSpec, root: Root, index: int) -> str:
    """Name of the router's weight [experts, hidden] of a layer that has experts."""
    assert spec.experts is not None
    return f"{root.layer(index)}.{spec.experts.block}.gate.weight"


def layer_norms(spec: DecoderSpec, root: Root, index: int) -> dict[str, tuple[str, int]]:
    """Name and size of each norm's weight of one block, by the names of `Layer`'s fields."""
    layer, hidden = root.layer(index), spec.hidden_size
    norms = {
        "input_norm": (f"{layer}.input_layernorm.weight", hidden),
        "mlp_norm": (f"{layer}.post_attention_layernorm.weight", hidden),
    }
    if spec.output_norms:
        norms["attention_output_norm"] = norms["mlp_norm"]
        norms["mlp_norm"] = (f"{layer}.pre_feedforward_layernorm.weight", hidden)
        norms["mlp_output_norm"] = (f"{layer}.post_feedforward_layernorm.weight", hidden)
    if spec.qk_norm:
        norms["query_norm"] = (f"{layer}.self_attn.q_norm.weight", spec.head_dim)
        norms["key_norm"] = (f"{layer}.self_attn.k_norm.weight", spec.head_dim)
    return norms


def _mlp(spec: DecoderSpec, layer: str) -> dict[str, LinearParts]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    gate_up = LinearParts(
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"), (inner, inner), hidden, spec.mlp_bias
    )
    if spec.fused_tensors:
        gate_up = LinearParts((f"{layer}.mlp.gate_up_proj",), (2 * inner,), hidden, spec.mlp_bias)
    down = LinearParts((f"{layer}.mlp.down_proj",), (hidden,), inner, spec.mlp_bias)
    return {"gate_up": gate_up, "down": down}
