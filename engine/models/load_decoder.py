"""From a checkpoint's tensors to a `Decoder`, one layer at a time.

Each layer is read from the mapped files, fused, converted, quantized and laid out before the next
is touched, experts one by one, and the files are unmapped in between: at the peak there are the
finished weights and one layer's originals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.errors import ConfigError
from engine.freed_memory import return_freed_memory
from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from engine.models.experts import Experts
from engine.models.spec import DecoderSpec
from engine.models.tensors import LinearParts, Root, layer_linears, layer_norms, router
from engine.quantize import forms
from engine.quantize.forms import DenseForm, LinearForm
from engine.quantize.methods import quantize_head, quantize_weight
from kernels.ops import DenseWeight, LinearWeight, pack_dense


def load_decoder(
    source: TensorSource,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    head_quantization: str | None = None,
) -> Decoder:
    """Read, quantize and lay out a model.

    `quantization` is `none`, which keeps what the checkpoint has, or a method of
    `engine.quantize.methods` that needs no calibration. The output head follows it, or
    `head_quantization` where a calibrated method has written the layers and left the head alone.

    Raises:
        ModelError: a tensor is missing, unreadable or of another shape than the config says.
        ConfigError: a method for a checkpoint that is quantized already.
    """
    if quantization != "none" and source.quantization is not None:
        raise ConfigError(
            f"quantization={quantization} was asked for, but the checkpoint is already quantized "
            f"({source.quantization}): set quantization=none, or give the unquantized model"
        )
    reader = LayerReader(source, spec, dtype, device, quantization)
    embedding, head = reader.embedding_and_head(head_quantization or quantization)
    source.release()
    layers = []
    for index in range(spec.num_layers):
        layers.append(reader.layer(index))
        source.release()
        return_freed_memory()
    final_norm = reader.norm(reader.root.final_norm, spec.hidden_size)
    source.release()
    return Decoder(spec, embedding, layers, final_norm, head, dtype, device)


@dataclass(frozen=True, slots=True)
class LayerReader:
    """Reads parts of a model into memory of their own, laid out in `dtype` and on `device`."""

    source: TensorSource
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device
    quantization: str = "none"

    @property
    def root(self) -> Root:
        """Where the model's tensors are in the checkpoint."""
        return Root.find(self.spec, self.source)

    def layer(self, index: int) -> Layer:
        """One block.

        Raises:
            ModelError: as `load_decoder`.
        """
        root = self.root
        linears = layer_linears(self.spec, root, index)
        norms = {
            field: self.norm(name, size)
            for field, (name, size) in layer_norms(self.spec, root, index).items()
        }
        return Layer(
            qkv=self.linear(linears["qkv"]),
            output=self.linear(linears["output"]),
            mlp=self._mlp(index, linears),
            **norms,
        )

    def norm(self, name: str, size: int) -> Tensor:
        """A norm's factors [size]: float32 where the checkpoint has differences from 1."""
        weight = self.source.read(name, (size,))
        if self.spec.unit_norms:
            return weight.to(self.device, torch.float32) + 1.0
        return weight.to(self.device, self.dtype, copy=True)

    def linear(self, parts: LinearParts) -> LinearWeight:
        """One linear layer of the decoder, fused from those of the checkpoint."""
        found = [
            self.form(prefix, (rows, parts.columns))
            for prefix, rows in zip(parts.prefixes, parts.rows, strict=True)
        ]
        fused = forms.stack(found)
        kept = [owned(form) for form in found] if fused is None else [owned(fused, found)]
        return forms.pack([self._placed(form) for form in kept], self._bias(parts), self.dtype)

    def form(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """A linear layer of the checkpoint as it is stored, or quantized if that was asked for."""
        if self.quantization == "none":
            return self.source.linear(prefix, shape)
        weight = self.source.read(f"{prefix}.weight", shape).to(self.device)
        try:
            return quantize_weight(weight.to(self.dtype), self.quantization)
        except ValueError as error:
            raise self.source.problem(f"{prefix}.weight", f"is of no use: {error}") from error

    def embedding_and_head(self, quantization: str = "none") -> tuple[DenseWeight, LinearWeight]:
        """Embeddings and output head: one object where they are tied and neither is quantized."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        root = self.root
        embedding = pack_dense(self._read(f"{root.embedding}.weight", shape))
        prefix = root.embedding if self.spec.tie_word_embeddings else root.head
        if quantization == "none":
            form = self.source.linear(prefix, shape)
            if isinstance(form, DenseForm) and prefix == root.embedding:
                return embedding, embedding
        else:
            try:
                form = quantize_head(self._read(f"{prefix}.weight", shape), quantization)
            except ValueError as error:
                raise self.source.problem(f"{prefix}.weight", f"is of no use: {error}") from error
        return embedding, forms.pack([self._placed(owned(form))], None, self.dtype)

    def _mlp(self, index: int, linears: dict[str, LinearParts]) -> Mlp | Experts:
        if self.spec.experts is None or not self.spec.has_experts(index):
            return Mlp(self.linear(linears["gate_up"]), self.linear(linears["down"]))
        count = self.spec.experts.num_experts
        shape = (count, self.spec.hidden_size)
        routes = pack_dense(self._read(router(self.spec, self.root, index), shape))
        pairs = [
            tuple(self.linear(linears[f"experts.{i}.{part}"]) for part in ("gate_up", "down"))
            for i in range(count)
        ]
        return Experts(routes, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))

    def _bias(self, parts: LinearParts) -> Tensor | None:
        """The biases of all parts, or None.

        A checkpoint may carry biases that the architecture does not have, as GPTQ's writers do; of
        zeros they are nothing, others would be lost.
        """
        names = [f"{prefix}.bias" for prefix in parts.prefixes]
        biases = []
        for name, rows in zip(names, parts.rows, strict=True):
            if not parts.bias and name not in self.source:
                continue
            biases.append(self._read(name, (rows,)))
            if not parts.bias and bool(biases[-1].any()):
                raise self.source.problem(
                    name,
                    f"is not zero, but {self.spec.architecture} with this config.json has no such "
                    "bias",
                )
        return torch.cat(biases) if parts.bias else None

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # A copy always: a view would keep the file mapped, and change if the file does.
        return self.source.read(name, shape).to(self.device, self.dtype, copy=True)

    def _placed(self, form: LinearForm) -> LinearForm:
        if self.device.type == "cpu":
            return form
        return _mapped(form, lambda tensor: tensor.to(self.device))


def owned(form: LinearForm, read: Sequence[LinearForm] = ()) -> LinearForm:
    """The same form in memory of its own, which no unmapped file takes away.

    `read` are what it was stacked of, if it was: only what it shares with them is copied then.
    """
    mapped = {_storage(tensor) for part in (read or [form]) for tensor in _tensors(part).values()}
    return _mapped(form, lambda tensor: tensor.clone() if _storage(tensor) in mapped else tensor)


def _mapped(form: LinearForm, change: Callable[[Tensor], Tensor]) -> LinearForm:
    changes: dict[str, Any] = {name: change(value) for name, value in _tensors(form).items()}
    return dataclasses.replace(form, **changes)


def _tensors(form: LinearForm) -> dict[str, Tensor]:
    fields = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
