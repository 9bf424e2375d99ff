"""What README.md says is true: its speeds are those on file, its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autotune.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    "decode, batch 1": "decode_batch_1",
    "decode, batch 32": "decode_batch_32",
    "prefill, 1 × 256": "prefill_1x256",
    "prefill, 8 × 256": "prefill_8x256",
}


@pytest.mark.parametrize("label", ROWS)
def test_speeds_are_those_on_file(label: str) -> None:
    file = re.search(r"`(benchmarks/results/\S+/engine_speed\.json)`", README)
    assert file is not None
    results = json.loads((ROOT / file[1]).read_text())[ROWS[label]]
    row = re.search(rf"^\| {re.escape(label)} \| (.+) \|$", README, re.MULTILINE)
    assert row is not None
    expected = [f"{results['transformers']['median_s'] * 1e3:.1f}"] + [
        f"{results[m]['median_s'] * 1e3:.1f} ({results[m]['speedup']:.2f}×)"
        for m in ("none", "int8", "int4")
    ]
    assert row[1].split(" | ") == expected


# What multiplies by the weights that a method makes, as the speed benchmark names it.
FORMATS = {
    "int8": "int8 W8A8",
    "llm_int8": "llm_int8",
    "smoothquant": "int8 W8A8",
    "fp8": "fp8",
    "int4": "int4 g64",
    "nf4": "nf4",
    "gptq": "int4 g64",
    "awq": "int4 g64",
}


@pytest.mark.parametrize("method", FORMATS)
def test_qualities_are_those_on_file(method: str) -> None:
    file = re.search(r"`(benchmarks/results/\S+)/quantization_quality\.json`", README)
    assert file is not None
    folder = ROOT / file[1]
    methods = json.loads((folder / "quantization_quality.json").read_text())["methods"]
    (q,) = [m for m in methods if m["name"] == method]
    linears = json.loads((folder / "quantization_speed.json").read_text())["linears"]
    square = [layer["formats"] for layer in linears if (layer["n"], layer["k"]) == (4096, 4096)]
    loss, low, high = (q[f"quality_loss{end}"] for end in ("", "_low", "_high"))
    row = re.search(rf"^\| {method} \| (.+) \|$", README, re.MULTILINE)
    assert row is not None
    assert row[1].split(" | ") == [
        f"{loss:.2%} ({low:.2%} to {high:.2%})",
        f"{q['kl']:.4f}",
        f"{q['top1_agreement']:.1%}",
        f"{q['weight_bytes'] / 1e6:.1f}",
        " / ".join(f"{f[FORMATS[method]]['speed_against_bf16']:.2f}" for f in square),
    ]


def test_commands_in_the_readme_exist() -> None:
    commands = set(re.findall(r"^    (?:\.venv/bin/)?autotune (\w+)", README, re.MULTILINE))
    assert commands
    assert commands <= set(COMMANDS)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("model", ["embedded", "135m"])
def test_accuracies_are_those_on_file(model: str) -> None:
    folder = ROOT / "benchmarks" / "results" / "xeon-amx-2core"
    results = json.loads((folder / f"advice_accuracy_{model}.json").read_text())
    assert [measured["model"] for measured in results["models"]] == [model]
    summary = results["summary"]["advice"]
    row = re.search(rf"^\| {model} \| (.+) \|$", README, re.MULTILINE)
    assert row is not None
    assert row[1].split(" | ") == [
        str(summary["scored"]),
        f"{summary['median_error']:.1%}",
        f"{summary['direction_right']:.0%}",
        f"{summary['held']:.0%}",
    ]


def test_what_diagnosis_named_is_on_file() -> None:
    folder = ROOT / "benchmarks" / "results" / "xeon-amx-2core"
    results = json.loads((folder / "diagnosis.json").read_text())
    claim = f"{results['named_first']} of {results['injected']} ({results['kinds']} kinds)"
    assert f"{claim} were named first" in README
    overhead = json.loads((folder / "profiling_overhead.json").read_text())["worst_overhead"]
    assert f"lengthened a step by {overhead:.1%} at worst" in README
