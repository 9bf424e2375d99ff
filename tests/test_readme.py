"""What README.md says is true: its numbers are those on file, its commands exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from autotune.cli.main import COMMANDS
from autotune.hardware.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "xeon-amx-2core"
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
    commands = set(re.findall(r"^    (?:\.venv/bin/)?autotune ([\w-]+)", README, re.MULTILINE))
    assert commands
    assert commands <= set(COMMANDS)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("model", ["embedded", "135m"])
def test_accuracies_are_those_on_file(model: str) -> None:
    results = json.loads((RESULTS / f"advice_accuracy_{model}.json").read_text())
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
    results = json.loads((RESULTS / "diagnosis.json").read_text())
    claim = f"{results['named_first']} of {results['injected']} ({results['kinds']} kinds)"
    assert f"{claim} were named first" in README
    overhead = json.loads((RESULTS / "profiling_overhead.json").read_text())["worst_overhead"]
    assert f"lengthened a step by {overhead:.1%} at worst" in README


@pytest.mark.parametrize("metric", ["TTFT", "TPOT", "E2E"])
@pytest.mark.parametrize("statistic", ["mean", "p99"])
def test_errors_of_simulation_are_those_on_file(metric: str, statistic: str) -> None:
    results = json.loads((RESULTS / "simulation_accuracy.json").read_text())
    held_out = results["held_out"]
    corrected = any(point.get("delay") for point in results["points"])
    assert corrected == ("What the machine added to each step in those minutes" in README)
    assert f"foretells {held_out['all']['configurations']}\nconfigurations" in README
    found = held_out[f"{metric.lower()} {statistic}"]
    row = re.search(rf"^\| {metric}, {statistic} \| (.+) \|$", README, re.MULTILINE)
    assert row is not None
    assert row[1].split(" | ") == [
        *(f"{found[load]['median_error']:.1%}" for load in ("50%", "85%", "95%")),
        f"{found['all loads']['coverage']:.0%}",
    ]


STRATEGIES = {"random": "random", "TPE": "tpe", "`autotune run`": "ours"}


@pytest.mark.parametrize("label", STRATEGIES)
def test_shares_of_the_best_are_those_on_file(label: str) -> None:
    results = json.loads((RESULTS / "search.json").read_text())
    budgets = results["budgets"]
    head = re.search(r"^\| share of the cost \| (.+) \|$", README, re.MULTILINE)
    row = re.search(rf"^\| {re.escape(label)} \| (.+) \|$", README, re.MULTILINE)
    assert head is not None
    assert row is not None
    shares = [float(cell.removesuffix("%")) / 100 for cell in head[1].split(" | ")]
    found = [budgets[f"{share:g}"][STRATEGIES[label]] for share in shares]
    assert row[1].split(" | ") == [
        f"{at['mean']:.3f} ({at['low']:.3f} to {at['high']:.3f})" for at in found
    ]
    assert f"searches {results['grid']['configurations']} configurations" in README
    assert f"mean over {results['seeds']} seeds" in README
    random, tpe = (budgets["0.1"]["ours"][f"p_better_than_{o}"] for o in ("random", "tpe"))
    assert f"against random gives p = {random:.2g}, against TPE p = {tpe:.2g}." in README


def test_speeds_of_prediction_are_those_on_file() -> None:
    results = json.loads((RESULTS / "simulation_speed.json").read_text())
    speeds = [speed["requests_per_core_second"] for speed in results["speeds"]]
    told = f"{min(speeds):,.0f} to {max(speeds):,.0f} requests of {results['output_tokens']} tokens"
    assert f"One core simulates {told} a second" in README
    seconds = statistics.median(results["plan"]["seconds"])
    assert len(results["plan"]["gpus"].split(",")) == 4
    assert f"a plan over four GPU types takes {seconds:.1f} s" in README


@pytest.mark.parametrize("machine", ["xeon-amx-2core", "zen3-2core"])
def test_speedups_of_drafts_are_those_on_file(machine: str) -> None:
    file = f"benchmarks/results/{machine}/speculation.json"
    results = json.loads((ROOT / file).read_text())
    told = {
        (line["batch"], line["method"]): line["predicted"]["value"]
        for line in results["predicted"]["lines"]
    }
    section = README[README.index(file) :]
    head = re.search(r"^\| requests \| (.+) \|$", section, re.MULTILINE)
    assert head is not None
    methods = [name.strip("`") for name in head[1].split(" | ")]
    for batch, measured in results["measured"].items():
        metric = "throughput" if int(batch) > results["seats"] else "tpot"
        row = re.search(rf"^\| {batch} at once \| (.+) \|$", section, re.MULTILINE)
        assert row is not None
        assert row[1].split(" | ") == [
            f"{measured['methods'][m][f'{metric}_speedup']:.2f}× ({told[int(batch), m]:.2f}×)"
            for m in methods
        ]
    predicted = results["predicted"]
    error, worst = predicted["median_error"], predicted["largest_error"]
    lines = len(predicted["lines"])
    near = f"{round(predicted['within_10_percent'] * lines)} of {lines} within 10%"
    words = " ".join(section.split())
    assert f"Half of the forecasts are within {error:.0%}, {near}, " in words
    assert f"none is further off than {worst:.0%}" in words
    drawn = [
        at["methods"][method]["throughput_speedup"]
        for at in results["measured_at_temperature_1"].values()
        for method in methods
    ]
    assert f"throughput lies between {min(drawn):.2f}× and {max(drawn):.2f}×" in words
    slowest = max(results["ngram_seconds"].values())
    assert f"Looking up takes at most {slowest * 1e6:.0f} µs" in words
    if machine == "zen3-2core":
        held = f"{round(predicted['inside'] * lines)} inside their 90% intervals"
        assert f"{near}, {held}, none is further off than {worst:.0%}" in words
        lost = 1.0 - results["measured"]["8"]["methods"]["draft_model"]["throughput_speedup"]
        assert f"`draft_model` at 8 loses {lost:.0%} of it" in words


def test_what_tuning_vllm_brought_is_on_file() -> None:
    tuned = json.loads((RESULTS / "vllm_tuned.json").read_text())
    told = re.search(
        r"went from (\S+) to (\S+) requests/s: a gain of (\S+), 95% interval\s+(\S+) to (\S+) ",
        README,
    )
    assert told is not None
    gain = tuned["gain"]
    numbers = [tuned[side]["goodput_requests_per_s"] for side in ("default", "winner")]
    numbers += [gain["value"], gain["low"], gain["high"]]
    assert list(told.groups()) == [f"{number:.2f}" for number in numbers]
    assert "ngram" in tuned["changes"]["speculative_method"]
    # Of two trials that differ in drafts alone, the one with them is ahead by more than the gain.
    plain, drafting = tuned["search"][1:3]
    drafts = {"speculative_method": "ngram", "num_speculative_tokens": 4}
    assert drafting["config"] == {**plain["config"], **drafts}
    assert drafting["objective"] - plain["objective"] > gain["value"]
    assert not any(limit["met"] for limit in tuned["winner"]["slo"])


def test_what_serving_costs_is_on_file() -> None:
    served = json.loads((RESULTS / "serving.json").read_text())
    many, overhead = served["many_streams"], served["overhead"]
    assert many["finished"] == many["streams"] == 500
    assert many["lost_tokens"] == many["answers_that_differ"] == 0
    told = re.search(
        r"comes (\S+) s after the start.+ client (\S+) ms after.+ between (\S+)% and (\S+)% ",
        README,
        re.DOTALL,
    )
    assert told is not None
    assert list(told.groups()) == [
        f"{served['start']['median_s']:.1f}",
        f"{overhead['first_token_beside_engine_s']['p95'] * 1e3:.1f}",
        *(f"{100 * share:.1f}" for share in overhead["throughput_lost"]["interval"]),
    ]
    assert served["load"]["threads"] == 1


def test_other_generators_agree_on_file() -> None:
    compared = json.loads((RESULTS / "cross_check.json").read_text())["ours_over"]
    for tool in ("vllm", "guidellm"):
        assert {"ttft_p95", "tpot_p95", "e2e_p95", "requests_per_s"} <= compared[tool].keys()
        assert all(abs(metric["ratio"] - 1) <= 0.05 for metric in compared[tool].values())


def test_the_catalogue_has_as_many_gpus_as_is_said() -> None:
    number = len(load_catalogue().names())
    assert f"Figures and prices of {number} GPUs" in README
    assert f"{number} GPUs are known" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
