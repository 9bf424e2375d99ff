"""A GGUF file as a source of tensors with Hugging Face names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.gguf.config import gguf_config
from engine.checkpoints.gguf.file import GgufFile, TensorInfo
from engine.errors import ModelError
from engine.quantize.forms import IntGroupForm, LinearForm, has_path, take_rows

_FLOATS = ("F32", "F16", "BF16")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufSource:
    """Tensors of one GGUF file; see `engine.checkpoints.source.TensorSource`.

    Llama's query and key rows lie in the order of interleaved rotary pairs and are put back into
    the order of halves that Hugging Face's models have.

    Raises:
        ModelError: the file is broken or of an architecture that is not read.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        config = gguf_config(self._file)
        self._heads: dict[str, int] = {}
        if config["model_type"] == "llama":
            self._heads = {
                "q_proj": config["num_attention_heads"],
                "k_proj": config["num_key_value_heads"],
            }
        self._dequantized: Counter[str] = Counter()

    @property
    def quantization(self) -> str | None:
        """ "gguf" and the prevailing type of the matrices; None if they are all floats."""
        kinds = Counter(i.type.name for i in self._file.tensors.values() if len(i.shape) == 2)
        quantized = [kind for kind, _ in kinds.most_common() if kind not in _FLOATS]
        return f"gguf {' and '.join(quantized)}" if quantized else None

    @property
    def notes(self) -> list[str]:
        """What was dequantized for want of a kernel."""
        return [
            f"{self._file.path.name}: {count} linear layers are {kind}, for which there is no "
            "kernel: dequantized"
            for kind, count in sorted(self._dequantized.items())
        ]

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._file.tensors

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor; blocks are dequantized.

        Raises:
            ModelError: no such tensor, or of another shape.
        """
        info = self._find(name, shape)
        values = info.type.floats(self._file.rows(info)).view(info.shape)
        index = self._row_order(name, info)
        return values if index is None else values[index]

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight of a linear layer, as integers where the kernels multiply by them.

        Raises:
            ModelError: no such tensor, or of another shape.
        """
        name = f"{prefix}.weight"
        info = self._find(name, shape)
        form = info.type.form(self._file.rows(info))
        if info.type.name not in _FLOATS and (info.type.affine is None or not has_path(form)):
            self._dequantized[info.type.name] += 1
        if isinstance(form, IntGroupForm) and not bool(
            torch.isfinite(form.scales).all() and torch.isfinite(form.zeros).all()
        ):
            raise self.problem(name, "holds scales that are infinite or not a number")
        index = self._row_order(name, info)
        return form if index is None else take_rows(form, index)

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        return ModelError(f"{self._file.path}: tensor {_gguf_name(name)!r} {text}")

    def release(self) -> None:
        """Let the pages that were read go; they are read again when asked for."""
        self._file.forget()

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        stored = _gguf_name(name)
        info = self._file.tensors.get(stored)
        path = self._file.path
        if info is None:
            raise ModelError(f"{path} has no tensor {stored!r} ({name}) of shape {list(shape)}")
        if info.shape != shape:
            raise ModelError(
                f"{path}: tensor {stored!r} has shape {list(info.shape)}, the file's metadata asks "
                f"for {list(shape)}"
            )
        return info

    def _row_order(self, name: str, info: TensorInfo) -> Tensor | None:
        """Where each row of a query or key projection of Llama lies; None: where it should."""
        heads = next((h for part, h in self._heads.items() if f".{part}." in name), 0)
        rows = info.shape[0]
        if not heads or rows % (2 * heads):
            return None
        pairs = torch.arange(rows).view(heads, rows // heads // 2, 2)
        return pairs.transpose(1, 2).flatten()


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tokenizer metadata of a GGUF file, without its tensors.

    Raises:
        ModelError: the file is broken or of an architecture that is not read.
    """
    file = GgufFile(path)
    return gguf_config(file), file.metadata


def _gguf_name(name: str) -> str:
    """The tensor's name in the file; one that no tensor has, if there is no counterpart."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        return name
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
