"""From a folder's tensors to a `Decoder`, one layer at a time.

Each layer is read from the mapped files, fused, converted, quantized and laid out before the next
is touched, and the files are unmapped in between: at the peak there are the finished weights and
one layer's originals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.models.decoder import Decoder, Layer
from engine.models.spec import DecoderSpec
from engine.quantize.methods import Method, pack_head, pack_linear
from kernels.ops import LinearWeight, pack_dense

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads tensors into memory of their own, in the wanted dtype and on the wanted device."""

    files: SafetensorsFiles
    dtype: torch.dtype
    device: torch.device

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # A copy always: a view would keep the file mapped, and change if the file does.
        return self.files.read(name, shape).to(self.device, self.dtype, copy=True)

    def fuse(self, names: list[str], rows: list[int], columns: int) -> Tensor:
        """Stack weights [rows[i], columns] without a second copy of any."""
        # Looked up first: sizes that the files do not have must not be allocated.
        mapped = [
            self.files.read(name, (count, columns)) for name, count in zip(names, rows, strict=True)
        ]
        fused = torch.empty(sum(rows), columns, dtype=self.dtype, device=self.device)
        for part, source in zip(torch.split(fused, rows), mapped, strict=True):
            part.copy_(source)
        return fused

    def fuse_bias(self, names: list[str], rows: list[int]) -> Tensor:
        parts = [self.read(name, (count,)) for name, count in zip(names, rows, strict=True)]
        return torch.cat(parts)

    def linear(
        self,
        prefix: str,
        names: list[str],
        rows: list[int],
        columns: int,
        bias: bool,
        method: Method,
    ) -> LinearWeight:
        weight = self.fuse([f"{prefix}.{name}.weight" for name in names], rows, columns)
        added = self.fuse_bias([f"{prefix}.{name}.bias" for name in names], rows) if bias else None
        return pack_linear(weight, added, method)


def load_decoder(
    files: SafetensorsFiles,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Method,
) -> Decoder:
    """Read, quantize and lay out a model.

    Raises:
        ModelError: a tensor is missing, unreadable or of another shape than the config says.
    """
    reader = _Reader(files, dtype, device)
    embedding = pack_dense(reader.read(EMBEDDING, (spec.vocab_size, spec.hidden_size)))
    if not spec.tie_word_embeddings:
        head_weight = reader.read(HEAD, (spec.vocab_size, spec.hidden_size))
        head = pack_head(head_weight, quantization)
        del head_weight
    elif quantization == "none":
        head = embedding
    else:
        source = reader.read(EMBEDDING, (spec.vocab_size, spec.hidden_size))
        head = pack_head(source, quantization)
        del source
    files.release()
    layers = []
    for index in range(spec.num_layers):
        layers.append(_load_layer(reader, spec, index, quantization))
        files.release()
    final_norm = reader.read(FINAL_NORM, (spec.hidden_size,))
    files.release()
    return Decoder(spec, embedding, layers, final_norm, head, dtype, device)


def _load_layer(reader: _Reader, spec: DecoderSpec, index: int, method: Method) -> Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size = spec.qkv_sizes[0]
    return Layer(
        input_norm=reader.read(f"{prefix}.input_layernorm.weight", (hidden,)),
        qkv=reader.linear(
            attention,
            ["q_proj", "k_proj", "v_proj"],
            list(spec.qkv_sizes),
            hidden,
            spec.attention_bias,
            method,
        ),
        output=reader.linear(attention, ["o_proj"], [hidden], q_size, spec.attention_bias, method),
        post_attention_norm=reader.read(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        gate_up=reader.linear(
            mlp, ["gate_proj", "up_proj"], [inner, inner], hidden, spec.mlp_bias, method
        ),
        down=reader.linear(mlp, ["down_proj"], [hidden], inner, spec.mlp_bias, method),
    )
