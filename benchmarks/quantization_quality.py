"""What each quantization method costs in quality on the embedded model, in one command.

    python benchmarks/quantization_quality.py [--out benchmarks/results/<machine>/<name>.json]

The held-out text is scored in windows by the model as its checkpoint is and by each method's; the
output head is int8 in all of them but `none`. Calibration reads the built-in sample, which shares
nothing with the held-out text. Every figure has a 95% interval over windows.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.embedded import HELD_OUT, TARGET
from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.models.decoder import Decoder
from engine.models.load_decoder import LayerReader
from engine.models.registry import decoder_spec
from engine.quantize import forms
from engine.quantize.calibrate import cut_windows, quantize_layers
from engine.quantize.memory import theoretical_bytes
from engine.quantize.methods import quantize_head
from engine.quantize.overlay import Overlay
from engine.quantize.quality import TextScore, compare, score_text
from engine.quantize.quantize_layer import Recipe
from engine.tokenizer import load_tokenizer

SAMPLE = Path(forms.__file__).with_name("calibration_sample.txt")
WINDOW = 512
DISTRIBUTIONS = 8192
CPU = torch.device("cpu")

RECIPES = {
    "int8": Recipe("int8"),
    "llm_int8": Recipe("llm_int8"),
    "smoothquant": Recipe("smoothquant"),
    "fp8": Recipe("fp8"),
    "fp8, one scale a tensor": Recipe("fp8", fp8_scale_of="tensor"),
    "int4": Recipe("int4"),
    "gptq": Recipe("gptq"),
    "awq": Recipe("awq"),
    "int4 symmetric": Recipe("int4", symmetric=True),
    "gptq symmetric": Recipe("gptq", symmetric=True),
    "awq symmetric": Recipe("awq", symmetric=True),
    "gptq, columns as they stand": Recipe("gptq", activation_order=False),
    "nf4": Recipe("nf4"),
    "2:4 sparse": Recipe("none", sparsity="2:4"),
    "2:4 sparse, gptq": Recipe("gptq", sparsity="2:4"),
}
# (method, the rounding to nearest with the same bits, group and symmetry)
AGAINST_NEAREST = (
    ("gptq", "int4"),
    ("awq", "int4"),
    ("gptq symmetric", "int4 symmetric"),
    ("awq symmetric", "int4 symmetric"),
    ("smoothquant", "int8"),
)


class Model:
    """The embedded model, to be decoded as a recipe says."""

    def __init__(self) -> None:
        folder = open_model_folder(str(TARGET))
        self.spec = decoder_spec(folder)
        self.source = open_source(folder)
        self.tokenizer = load_tokenizer(TARGET)
        self.dtype = getattr(torch, self.spec.checkpoint_dtype)
        sample = self.tokenizer.encode(SAMPLE.read_text(encoding="utf-8"))
        self.windows = cut_windows(sample, WINDOW)
        self.held_out = self.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))

    def decoder(self, recipe: Recipe | None) -> Decoder:
        """Its decoder; with None as the checkpoint is."""
        tensors: dict[str, torch.Tensor] = {}
        weights: dict[str, forms.LinearForm] = {}
        if recipe is not None:
            walk = quantize_layers(self.source, self.spec, self.windows, recipe, self.dtype, CPU)
            for layer in walk:
                weights |= layer.forms
                tensors |= layer.tensors
        reader = LayerReader(Overlay(self.source, weights, tensors), self.spec, self.dtype, CPU)
        embedding, head = reader.embedding_and_head()
        if recipe is not None and recipe.method != "none":
            shape = (self.spec.vocab_size, self.spec.hidden_size)
            floats = self.source.read(f"{reader.root.embedding}.weight", shape)
            head = forms.pack([quantize_head(floats, recipe.method)], None, self.dtype)
        decoder = Decoder(
            self.spec,
            embedding,
            [reader.layer(index) for index in range(self.spec.num_layers)],
            reader.norm(reader.root.final_norm, self.spec.hidden_size),
            head,
            self.dtype,
            CPU,
        )
        decoder.set_max_position(WINDOW)
        return decoder


def less_than(scores: dict[str, TextScore], method: str, nearest: str) -> dict[str, Any]:
    """By what share a method's loss and divergence are below rounding to nearest, with intervals.

    The block bootstrap draws windows, the same for both.
    """
    reference = scores["none"]
    mine, theirs = (_by_window(scores[name], reference) for name in (method, nearest))
    generator = np.random.default_rng(0)
    count = len(mine[0])
    chosen = generator.integers(count, size=(2000, count))
    found: dict[str, Any] = {"method": method, "nearest": nearest}
    measures: dict[str, Callable[[Any], Any]] = {"quality_loss": np.expm1, "kl": lambda x: x}
    for place, (name, change) in enumerate(measures.items()):
        a, b = mine[place], theirs[place]
        drawn = 1 - change(a[chosen].mean(axis=1)) / change(b[chosen].mean(axis=1))
        found[f"{name}_less"] = float(1 - change(a.mean()) / change(b.mean()))
        found[f"{name}_less_low"] = float(np.quantile(drawn, 0.025))
        found[f"{name}_less_high"] = float(np.quantile(drawn, 0.975))
    return found


def _by_window(score: TextScore, reference: TextScore) -> tuple[Any, Any]:
    nats = (score.nll.double() - reference.nll.double()).mean(dim=1)
    pairs = zip(reference.log_probs, score.log_probs, strict=True)
    kl = [float((p.double().exp() * (p.double() - q.double())).sum(-1).mean()) for p, q in pairs]
    return nats.numpy(), np.array(kl)


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=[*RECIPES], help="methods; default all")
    arguments = parser.parse_args()
    model = Model()
    scores: dict[str, TextScore] = {}
    rows: list[dict[str, Any]] = []
    for name, recipe in {"none": None, **RECIPES}.items():
        if arguments.only and name not in ("none", *arguments.only):
            continue
        begin = time.perf_counter()
        decoder = model.decoder(recipe)
        seconds = time.perf_counter() - begin
        scores[name] = score_text(decoder, model.held_out, WINDOW, DISTRIBUTIONS)
        method = "none" if recipe is None else recipe.method
        theory = theoretical_bytes(model.spec, method, model.dtype.itemsize)
        loss = compare(scores[name], scores["none"])
        rows.append(
            {
                "name": name,
                **dataclasses.asdict(loss),
                "weight_bytes": decoder.nbytes,
                "theoretical_bytes": theory,
                "quantize_seconds": round(seconds, 1),
            }
        )
        print(
            f"{name:28} perplexity {loss.quality_loss:+8.3%} "
            f"({loss.quality_loss_low:+.3%} to {loss.quality_loss_high:+.3%})  "
            f"KL {loss.kl:.5f} ({loss.kl_low:.5f} to {loss.kl_high:.5f}), p99 {loss.kl_p99:.4f}  "
            f"same top token {loss.top1_agreement:.2%}  {decoder.nbytes / 1e6:.2f} MB "
            f"({decoder.nbytes / theory:.1%} of theory)",
            flush=True,
        )
    compared = [
        less_than(scores, method, nearest)
        for method, nearest in AGAINST_NEAREST
        if method in scores and nearest in scores
    ]
    for pair in compared:
        print(
            f"{pair['method']} against {pair['nearest']}: perplexity loss "
            f"{pair['quality_loss_less']:.0%} less ({pair['quality_loss_less_low']:.0%} to "
            f"{pair['quality_loss_less_high']:.0%}), KL {pair['kl_less']:.0%} less "
            f"({pair['kl_less_low']:.0%} to {pair['kl_less_high']:.0%})"
        )
    if arguments.out:
        result = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "model": "autotune/embedded/target",
            "dtype": model.spec.checkpoint_dtype,
            "held_out_tokens": len(model.held_out) // WINDOW * WINDOW,
            "window_tokens": WINDOW,
            "calibration_tokens": model.windows.numel(),
            "group_size": 64,
            "methods": rows,
            "against_round_to_nearest": compared,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
