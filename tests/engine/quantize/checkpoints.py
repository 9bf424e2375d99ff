"""Tiny models with a tokenizer, quantized into folders, and read back by transformers and by us."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.source import TensorSource
from engine.errors import ModelError
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.quantize.forms import DenseForm, dequantize
from engine.quantize.options import WriteOptions
from engine.quantize.write_checkpoint import Written, write_checkpoint
from tests.engine.tiny_models import TinyModel, make_tiny, paged_logits

CPU = torch.device("cpu")
TEXT = "\n".join(f"line {i}: the answer to {i * 37 % 101} is {i * i % 89}" for i in range(80))


def make_model(
    case: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> TinyModel:
    """A tiny model of a case of `tiny_models`, with a tokenizer of ASCII characters."""
    tiny = make_tiny(case, folder, dtype=dtype, **config)
    write_tokenizer(folder)
    return tiny


def write_tokenizer(folder: Path) -> None:
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"\n": 95, "?unknown": 96}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="?unknown")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def write(model: Path, out: Path, text: str = TEXT, **options: Any) -> Written:
    """Quantize on the CPU with few tokens of calibration."""
    chosen = WriteOptions(**{"group_size": None, "calibration_tokens": 512, **options})
    return write_checkpoint(open_model_folder(model), chosen, text, out, device=CPU)


def stop_after(layers: int) -> tuple[threading.Event, Any]:
    """An event, and a listener that sets it when so many layers are done."""
    stop = threading.Event()
    return stop, lambda done, total: stop.set() if done >= layers else None


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the progress."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


class _Dequantized:
    """A source whose linear layers are the floats that they stand for."""

    quantization = None

    def __init__(self, base: TensorSource) -> None:
        self._base = base
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._base.read(name, shape)

    def linear(self, prefix: str, shape: tuple[int, int]) -> DenseForm:
        return DenseForm(dequantize(self._base.linear(prefix, shape)))

    def problem(self, name: str, text: str) -> ModelError:
        return self._base.problem(name, text)

    def release(self) -> None:
        self._base.release()


def our_logits(folder: Path, tokens: list[int], *, dequantized: bool) -> torch.Tensor:
    """float32 [tokens, vocabulary] of our decoder; with the kernels' own paths or with floats."""
    opened = open_model_folder(folder)
    spec, source = decoder_spec(opened), open_source(opened)
    decoder: Decoder = load_decoder(
        _Dequantized(source) if dequantized else source, spec, torch.float32, CPU, "none"
    )
    decoder.set_max_position(96)
    return paged_logits(decoder, tokens, [len(tokens)])


def their_logits(folder: Path, tokens: list[int], *, dequantized: bool = False) -> torch.Tensor:
    """What transformers computes; with `dequantized` it makes floats of the weights as it loads."""
    settings: dict[str, Any] = {}
    if dequantized:
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    images = "ConditionalGeneration" in config.architectures[0]
    auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        # That a setting beside the checkpoint's own is taken is what is wanted.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **settings
        ).eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()
