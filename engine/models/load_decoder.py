"""From a checkpoint's tensors to a `Decoder`, one layer at a time.

Each layer is read from the mapped files, fused, converted, quantized and laid out before the next
is touched, experts one by one, and the files are unmapped in between: at the peak there are the
finished weights and one layer's originals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.errors import ConfigError
from engine.freed_memory import return_freed_memory
from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from engine.models.experts import Experts
from engine.models.inner_order import InnerOrder
from engine.models.sharding import ALL, WHOLE, Cut, Shard
from engine.models.spec import DecoderSpec
from engine.models.tensors import LinearParts, Root, layer_linears, layer_norms, router
from engine.parallel import ALONE, Ranks
from engine.quantize import forms
from engine.quantize.form_slices import take_columns, take_runs
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
    ranks: Ranks = ALONE,
) -> Decoder:
    """Read, quantize and lay out a model, or this rank's part of it.

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
    shard = Shard(ranks.rank, ranks.size)
    reader = LayerReader(source, spec, dtype, device, quantization, shard)
    embedding, head = reader.embedding_and_head(head_quantization or quantization)
    source.release()
    layers = []
    for index in range(spec.num_layers):
        layers.append(reader.layer(index))
        source.release()
        return_freed_memory()
    final_norm = reader.norm(reader.root.final_norm, spec.hidden_size)
    source.release()
    decoder = Decoder(shard.spec(spec), embedding, layers, final_norm, head, dtype, device, ranks)
    if reader.widened:
        decoder.notes.append(
            f"{len(reader.widened)} linear layers ({reader.widened[0]}, …) are quantized in groups "
            f"of columns that lie in another order, which {ranks.size} ranks cut: dequantized to "
            "the model's dtype"
        )
    return decoder


@dataclass(frozen=True, slots=True)
class LayerReader:
    """Reads parts of a model into memory of their own, laid out in `dtype` and on `device`.

    `spec` is the whole model's; of its matrices the part of `shard` is kept, rounded as in the
    whole: where a scale is that of a row, the row is read before it is cut. `widened` are the
    layers that became floats because they are cut.
    """

    source: TensorSource
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device
    quantization: str = "none"
    shard: Shard = ALL
    widened: list[str] = field(default_factory=list)

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
            qkv=self.linear("qkv", linears["qkv"]),
            output=self.linear("output", linears["output"]),
            mlp=self._mlp(index, linears),
            **norms,
        )

    def norm(self, name: str, size: int) -> Tensor:
        """A norm's factors [size]: float32 where the checkpoint has differences from 1."""
        weight = self.source.read(name, (size,))
        if self.spec.unit_norms:
            return weight.to(self.device, torch.float32) + 1.0
        return weight.to(self.device, self.dtype, copy=True)

    def linear(
        self, name: str, parts: LinearParts, inner: InnerOrder | None = None
    ) -> LinearWeight:
        """The linear layer `name` of a block, fused from those of the checkpoint.

        Those of an MLP may have its inner features in another order.
        """
        cut = self.shard.cut(self.spec, name, parts)
        found = [
            self.form(prefix, (rows, parts.columns), cut, place, inner)
            for place, (prefix, rows) in enumerate(zip(parts.prefixes, parts.rows, strict=True))
        ]
        fused = forms.stack(found)
        kept = [owned(form) for form in found] if fused is None else [owned(fused, found)]
        placed = [self._placed(form) for form in kept]
        return forms.pack(placed, self._bias(parts, cut, inner), self.dtype)

    def form(
        self,
        prefix: str,
        shape: tuple[int, int],
        cut: Cut = WHOLE,
        place: int = 0,
        inner: InnerOrder | None = None,
    ) -> LinearForm:
        """A linear layer of the checkpoint as it is stored, or quantized if that was asked for.

        Of it what `cut` takes; it is part `place` of what is cut.
        """
        runs = None if cut.rows is None else [(r.start, r.stop) for r in cut.rows[place]]
        if self.quantization == "none":
            form = self.source.linear(prefix, shape) if inner is None else inner.form(prefix, shape)
            form = form if runs is None else take_runs(form, runs)
        else:
            weight = self.source.read(f"{prefix}.weight", shape)
            if runs is not None:  # every method rounds each row by itself
                weight = torch.cat([weight[start:stop] for start, stop in runs])
            try:
                form = quantize_weight(weight.to(self.device).to(self.dtype), self.quantization)
            except ValueError as error:
                raise self.source.problem(f"{prefix}.weight", f"is of no use: {error}") from error
        if cut.columns is not None:
            whole, form = form, take_columns(form, cut.columns.start, cut.columns.stop)
            if type(form) is not type(whole):
                self.widened.append(prefix)
        return form

    def embedding_and_head(self, quantization: str = "none") -> tuple[DenseWeight, LinearWeight]:
        """Embeddings and output head: one object where they are tied and neither is quantized."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        root = self.root
        own = self.shard.vocabulary(self.spec.vocab_size)
        run = (own.start, own.stop)
        embedding = pack_dense(self._read(f"{root.embedding}.weight", shape, run))
        prefix = root.embedding if self.spec.tie_word_embeddings else root.head
        if quantization == "none":
            form = self.source.linear(prefix, shape)
            if isinstance(form, DenseForm) and prefix == root.embedding:
                return embedding, embedding
            if self.shard.size > 1:
                form = take_runs(form, [run])
        else:
            try:
                form = quantize_head(self._read(f"{prefix}.weight", shape, run), quantization)
            except ValueError as error:
                raise self.source.problem(f"{prefix}.weight", f"is of no use: {error}") from error
        return embedding, forms.pack([self._placed(owned(form))], None, self.dtype)

    def _mlp(self, index: int, linears: dict[str, LinearParts]) -> Mlp | Experts:
        if self.spec.experts is None or not self.spec.has_experts(index):
            return Mlp(*self._pair("gate_up", "down", linears))
        count = self.spec.experts.num_experts
        shape = (count, self.spec.hidden_size)
        routes = pack_dense(self._read(router(self.spec, self.root, index), shape))
        names = [(f"experts.{i}.gate_up", f"experts.{i}.down") for i in range(count)]
        return Experts.of(routes, [self._pair(*pair, linears) for pair in names])

    def _pair(
        self, gate_up: str, down: str, linears: dict[str, LinearParts]
    ) -> tuple[LinearWeight, LinearWeight]:
        """Both layers of an MLP."""
        inner = None
        if self.shard.size > 1 and self.quantization == "none":
            inner = InnerOrder.of(self.source, linears[down])
        return self.linear(gate_up, linears[gate_up], inner), self.linear(
            down, linears[down], inner
        )

    def _bias(self, parts: LinearParts, cut: Cut, inner: InnerOrder | None = None) -> Tensor | None:
        """The biases of all parts, or None; of those that are cut what `cut` takes.

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
        if not parts.bias or not cut.bias:
            return None
        if cut.rows is not None:
            if inner is not None:
                biases = [inner.bias(bias) for bias in biases]
            biases = [
                bias[run.start : run.stop]
                for bias, runs in zip(biases, cut.rows, strict=True)
                for run in runs
            ]
        return torch.cat(biases)

    def _read(
        self, name: str, shape: tuple[int, ...], run: tuple[int, int] | None = None
    ) -> Tensor:
        """A tensor in floats, or its rows from run[0] up to run[1]."""
        tensor = self.source.read(name, shape)
        if run is not None:
            tensor = tensor[run[0] : run[1]]
        # A copy always: a view would keep the file mapped, and change if the file does.
        return tensor.to(self.device, self.dtype, copy=True)

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
