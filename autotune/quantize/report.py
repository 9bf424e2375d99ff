"""What lies beside a written checkpoint: `quality.json`, and a card for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.records import write_atomically

_FIGURES = (
    ("perplexity, change", "quality_loss", 100.0, "%"),
    ("KL divergence, mean, nats", "kl", 1.0, ""),
    ("KL divergence, 99th percentile, nats", "kl_p99", 1.0, ""),
    ("top-1 agreement", "top1_agreement", 100.0, "%"),
)


def write_report(folder: Path, model: str, result: Mapping[str, Any]) -> None:
    """Write `quality.json` (the result as the command's --json has it) and `README.md`."""
    content = {"schema_version": 1, "model": model, **result, "checkpoint": folder.name}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "quality.json", text.encode())
    write_atomically(folder / "README.md", model_card(model, folder, result).encode())


def model_card(model: str, folder: Path, result: Mapping[str, Any]) -> str:
    """Markdown: what this is, how it was made, how it loads, what it costs."""
    lines = [
        f"# {model}, quantized: {result['description']}",
        "",
        f"A checkpoint of compressed-tensors, made of `{model}` by `autotune quantize`: "
        f"{megabytes(result['written_bytes'])} of weights instead of "
        f"{megabytes(result['source_bytes'])}.",
        "",
        *_calibration(result),
        "It loads with `transformers` (and `compressed-tensors`) and with "
        f"`autotune bench --model {folder.name}`.",
        "",
        "## Quality",
        "",
        *_quality(result["quality"]),
        "",
        "## Notes",
        "",
        *(f"- {note[:1].upper()}{note[1:]}." for note in result["notes"]),
    ]
    return "\n".join(lines) + "\n"


def figures(quality: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, 95% interval) of each figure, for people."""
    rows = []
    for title, name, factor, unit in _FIGURES:
        value, low, high = (quality.get(key) for key in (name, f"{name}_low", f"{name}_high"))
        interval = "-"
        if low is not None and high is not None:
            interval = f"{low * factor:.3g}{unit} to {high * factor:.3g}{unit}"
        rows.append((title, "-" if value is None else f"{value * factor:.3g}{unit}", interval))
    return rows


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _calibration(result: Mapping[str, Any]) -> list[str]:
    tokens = result["calibration_tokens"]
    return [f"Calibrated on {tokens} tokens of text.", ""] if tokens else []


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if quality is None:
        return ["Not measured."]
    reference, own = quality["reference_perplexity"], quality["perplexity"]
    return [
        f"Against the original on {quality['windows']} windows of held-out text, with 95% "
        f"intervals. Perplexity {_number(reference)} before, {_number(own)} after.",
        "",
        "| | value | 95% interval |",
        "|---|---|---|",
        *(f"| {title} | {value} | {interval} |" for title, value, interval in figures(quality)),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
