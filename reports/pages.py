"""The plain sections of the page: workload, environment, how to reproduce, glossary."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from reports.evidence import Evidence
from reports.formatting import (
    MISSING,
    duration,
    knob_value,
    mapping,
    milliseconds,
    moment,
    number,
    percent,
    sequence,
    significant,
    size,
)

_LONGEST_FILE = 40_000

GLOSSARY: Sequence[tuple[str, str]] = (
    (
        "TTFT",
        "Time to first token: from the moment at which the workload wanted the request sent (not "
        "when it was sent) to its first token.",
    ),
    (
        "TPOT",
        "Time per output token of one request: (E2E − TTFT) / (output tokens − 1); undefined for "
        "a single token. Some tools call this inter-token latency.",
    ),
    (
        "ITL",
        "Inter-token latency: the gaps between streamed tokens, pooled over all requests.",
    ),
    ("E2E", "End-to-end latency: from the intended send to the last token."),
    (
        "Goodput",
        "Requests that met every per-request limit of the SLO, divided by the duration; failed, "
        "refused and timed-out requests are misses.",
    ),
    (
        "SLO",
        "Service-level objective: the limits that were asked for. A limit without a named "
        "statistic is on the 95th percentile; unfinished requests count as infinitely late.",
    ),
    (
        "Open-loop load",
        "Requests arrive when the workload says, never waiting for earlier ones to finish. Where "
        "the generator could not keep up, the load was not delivered and nothing is claimed.",
    ),
    (
        "Gain",
        "Ratio of the winner’s objective to the default’s (inverted where less is better), so "
        "that above 1 is better; from rounds of both, interleaved.",
    ),
    (
        "Interval",
        "The range in which the value lies with the given confidence. A gain whose interval "
        "includes 1 is not proven.",
    ),
    (
        "Perplexity",
        "How surprised a model is by a held-out text, e to the mean of its negative log-likelihood "
        "a token. Its change against the unquantized model is what the SLO calls quality_loss.",
    ),
    (
        "KL",
        "Kullback-Leibler divergence of the next-token distribution from that of the unquantized "
        "model, in nats a token: 0 where both are equal.",
    ),
    (
        "Top-1 agreement",
        "Share of the held-out text’s positions at which the model and its unquantized self find "
        "the same token likeliest.",
    ),
    (
        "Speculation",
        "Tokens are guessed (drafted) to follow a request’s last one, and one step verifies them: "
        "those that the model itself would have chosen are accepted, and it adds one of its own. "
        "What is generated stays what it was.",
    ),
    (
        "Tokens a step",
        "What a decode gets from a step on the mean: its own token and the accepted ones.",
    ),
    (
        "Preemption",
        "A running request gives its KV blocks back when the cache is full and is computed again "
        "later.",
    ),
)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A text to copy."""

    title: str
    text: str
    note: str = ""


def workload_facts(evidence: Evidence) -> list[tuple[str, str]]:
    """What the load was."""
    workload = mapping(evidence.run.get("workload"))
    scaling = mapping(workload.get("scaling"))
    facts = [
        ("Source", _text(workload.get("source"))),
        ("Format", _text(workload.get("format"))),
        ("Requests", significant(number(workload.get("requests")), 6)),
        ("Duration", duration(number(workload.get("duration_s")))),
        ("Mean rate", _with_unit(number(workload.get("rate")), "requests/s")),
        ("Shared prefix", percent(number(workload.get("prefix_share")))),
    ]
    facts += [
        (f"Scaled {key}", _text(value))
        for key, value in scaling.items()
        if key != "notes" and value not in (None, "", 1, 1.0)
    ]
    facts.append(("Fingerprint", _fact("fingerprint", workload.get("fingerprint"))))
    return [(name, value) for name, value in facts if value not in (MISSING, "")]


def workload_notes(evidence: Evidence) -> list[str]:
    """What was done to the trace before it was sent."""
    scaling = mapping(mapping(evidence.run.get("workload")).get("scaling"))
    return [str(note) for note in sequence(scaling.get("notes"))]


def run_notes(evidence: Evidence) -> list[str]:
    """What the run has to say of itself, but for what stands with the workload."""
    notes = sequence(evidence.result.get("notes")) or sequence(evidence.run.get("notes"))
    told = workload_notes(evidence)
    return [text for note in notes if (text := str(note)) not in told]


def workload_lengths(evidence: Evidence) -> list[list[str]]:
    """Token lengths of the workload: a row for prompts and one for outputs."""
    workload = mapping(evidence.run.get("workload"))
    rows = []
    for key, title in (("input_tokens", "Prompt"), ("output_tokens", "Output")):
        lengths = mapping(workload.get(key))
        if lengths:
            rows.append(
                [
                    title,
                    *(significant(number(lengths.get(k))) for k in ("mean", "p50", "p95", "max")),
                ]
            )
    return rows


def environment_facts(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model, machine, versions and seeds, each a titled list."""
    run = evidence.run
    engine = [
        (knob, knob_value(knob, value)) for knob, value in mapping(run.get("engine_config")).items()
    ]
    timing = [
        ("started", moment(run.get("started_at"))),
        ("finished", moment(run.get("finished_at"))),
        ("budget", duration(number(run.get("budget_s")))),
        ("most trials", _text(run.get("max_trials"))),
        ("trials ended", str(len(evidence.trials))),
        ("time in trials", duration(sum(number(t.seconds) or 0.0 for t in evidence.trials))),
    ]
    groups = [
        ("Model", _facts(mapping(run.get("model")))),
        ("Hardware", _facts(mapping(run.get("hardware")))),
        ("Versions", _facts(mapping(run.get("versions")))),
        ("Run", timing + _facts(mapping(run.get("seeds")))),
        (
            "Engine configuration"
            if run.get("kind") == "bench"
            else "Default engine configuration",
            engine,
        ),
    ]
    return [
        (title, [(k, v) for k, v in facts if v not in (MISSING, "")])
        for title, facts in groups
        if facts
    ]


def search_space(evidence: Evidence) -> list[tuple[str, str]]:
    """Each knob searched, with the values that it could take."""
    return [
        (knob, ", ".join(knob_value(knob, v) for v in sequence(choices)) or _text(choices))
        for knob, choices in mapping(evidence.run.get("search_space")).items()
    ]


def engine_counters(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """What the engine counted in the measured rounds, a column a side: (columns, rows)."""
    names: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "completed": ("Requests finished", significant),
        "failed": ("Requests failed", significant),
        "refused": ("Requests refused", significant),
        "timed_out": ("Requests timed out", significant),
        "error_rate": ("Error rate", percent),
        "duration_s": ("Duration", duration),
        "offered_rate": ("Offered rate (requests/s)", significant),
        "engine.steps": ("Engine steps", significant),
        "engine.mean_batch": ("Mean sequences a step", significant),
        "engine.preemptions": ("Preemptions", significant),
        "engine.prefix_hit_rate": ("Prefix hits", percent),
        "engine.kv_peak_usage": ("KV cache, peak use", percent),
        "engine.kv_blocks_total": ("KV cache blocks", significant),
        "engine.host_share": ("Time on the host", percent),
        "engine.device_share": ("Time on the device", percent),
    }
    rows = []
    for key, (title, write) in names.items():
        values = []
        for side in evidence.sides:
            scope = mapping(side.bench.get("engine")) if "." in key else side.bench
            values.append(number(scope.get(key.split(".")[-1])))
        if any(value is not None for value in values):
            rows.append([title, *(write(value) for value in values)])
    return ["Quantity", *(side.label for side in evidence.sides)], rows


def reproduction(evidence: Evidence) -> list[Snippet]:
    """The command of this run and the configuration files beside the report."""
    snippets = []
    command = [str(part) for part in sequence(evidence.run.get("command"))]
    if command:
        # Where the program lay on this machine does not matter on another.
        command[0] = PurePath(command[0]).name
        snippets.append(
            Snippet(
                "Run the search again",
                shlex.join(command),
                "With the same seed and versions; measured times differ by the machine’s noise.",
            )
        )
    for name, title in (
        ("engine.yaml", "Serve with the bundled engine"),
        ("vllm.yaml", "Serve with vLLM"),
    ):
        file = evidence.folder / "deploy" / name
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            note = f"deploy/{name} in the run folder"
            if len(text) > _LONGEST_FILE:
                text, note = text[:_LONGEST_FILE], note + ", its beginning"
            snippets.append(Snippet(title, text.rstrip(), note))
    return snippets


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _fact(key, value)) for key, value in values.items()]


def _fact(key: str, value: Any) -> str:
    amount = number(value)
    if key == "fingerprint" and isinstance(value, str):
        return value[:16]  # enough to tell one from another; run.json has all of it
    if amount is not None and key.endswith("_bytes"):
        return size(amount)
    if amount is not None and key.endswith(("_seconds", "_s")):
        return milliseconds(amount)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 10**15 else _text(amount)
    return _text(value)


def _with_unit(value: float | None, unit: str) -> str:
    return MISSING if value is None else f"{significant(value)} {unit}"


def _text(value: Any) -> str:
    """A plain value as text; nested ones as `key value` pairs."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_fact(k, v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    if isinstance(value, float):
        return significant(number(value), 6)
    return str(value)
