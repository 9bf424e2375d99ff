"""The page of a plan, whole."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from reports.advice import infeasible_rows
from reports.charts.cost_frontier import cost_frontier
from reports.charts.growth_bars import growth_figure, growth_sentence
from reports.charts.memory_bars import memory_bars
from reports.charts.sensitivity import flips, sensitivity_figure
from reports.formatting import duration, mapping, moment, number, sequence
from reports.page import finite, render_page
from reports.plan.assumptions import (
    asked_facts,
    asked_lengths,
    assumed,
    model_facts,
    not_simulated,
    sheets,
)
from reports.plan.evidence import read_plan
from reports.plan.options import option_table, ranked_columns, ranked_rows
from reports.plan.verdict import judge_plan

GLOSSARY = (
    (
        "Chance",
        "Share of the draws in which the promise is kept. A draw guesses once at everything that "
        "is not known (how much of its data sheet a GPU reaches, the costs of launches and of the "
        "host) and at the arrivals, and simulates the traffic with that.",
    ),
    (
        "Replica",
        "One copy of the model with the GPUs that it is split over (TP). Requests are spread over "
        "the replicas by a router.",
    ),
    (
        "Spare replica",
        "One more than the load needs, so that the promise holds while one is down or being "
        "updated.",
    ),
    (
        "TTFT",
        "Time to first token: from the moment a request arrives to its first token.",
    ),
    (
        "TPOT",
        "Time per output token after the first: (end-to-end latency − TTFT) / (output tokens − 1).",
    ),
    (
        "Interval",
        "The range in which the value lies with 90% probability, by what is known of the hardware.",
    ),
    (
        "KV cache",
        "The keys and values of all tokens of the requests under way. Where it is full, requests "
        "wait.",
    ),
    (
        "Bounded by",
        "What would have to be larger for fewer GPUs to suffice: memory for weights or for keys "
        "and values, memory bandwidth, arithmetic, or the least time that a step takes.",
    ),
)


def plan_page(raw: Mapping[str, Any]) -> str:
    """The whole page of a plan, from the content of `plan.json`."""
    plan = read_plan(raw)
    command = [str(part) for part in sequence(raw.get("command"))]
    if command:
        # Where the program lay on this machine does not matter on another.
        command[0] = PurePath(command[0]).name
    return render_page(
        "plan.html.j2",
        plan_json=finite(dict(raw)),
        model=str(plan.model.get("name") or plan.model.get("path") or "unnamed model"),
        made=moment(raw.get("created_at")),
        verdict=judge_plan(plan),
        infeasible=infeasible_rows(raw),
        threshold=plan.threshold,
        ranked_columns=ranked_columns(plan),
        ranked=ranked_rows(plan),
        table=option_table(plan),
        frontier=cost_frontier(plan),
        memory=memory_bars(plan),
        growth=growth_figure(plan),
        growth_told=growth_sentence(plan),
        flips=flips(plan),
        sensitivity=sensitivity_figure(plan),
        asked=asked_facts(plan),
        lengths=asked_lengths(plan),
        model_facts=model_facts(plan),
        sheets=sheets(plan),
        assumed=assumed(plan),
        not_simulated=not_simulated(plan),
        would_fit=[str(text) for text in sequence(raw.get("would_fit")) if text],
        notes=[str(note) for note in sequence(raw.get("notes")) if note],
        command=shlex.join(command),
        took=duration(number(raw.get("seconds"))),
        versions=", ".join(f"{k} {v}" for k, v in mapping(raw.get("versions")).items()),
        glossary=GLOSSARY,
    )
