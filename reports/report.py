"""`render_report`: a run folder in, one HTML file out."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autotune.records import RunFolder, write_atomically
from reports import pages
from reports.advice import advice_rows, first_advice, infeasible_rows
from reports.charts.breakdown import time_breakdown
from reports.charts.comparison import throughput_comparison
from reports.charts.distribution import latency_distributions, percentile_rows
from reports.charts.finalists import finalist_gains
from reports.charts.frontier import speed_against_quality
from reports.charts.histogram import workload_histograms
from reports.charts.history import search_history
from reports.charts.importance import knob_importances
from reports.charts.roofline import roofline
from reports.charts.scoreboard import scoreboard_figure
from reports.charts.slices import knob_slices
from reports.charts.timeline import engine_timeline
from reports.evidence import Evidence, read_evidence
from reports.findings import binding_sentence, findings_by_metric, unjudged
from reports.formatting import mapping, moment, sequence, significant
from reports.profile import PHASE_COLUMNS, partial_notes, phase_rows, profile_facts
from reports.quality import quality_table
from reports.trials import trial_table
from reports.verdict import judge

# Characters without a shape that a name from outside may hold: controls, and those that turn the
# direction of the text after them, by which a name could reverse the digits of a verdict.
_INVISIBLE = dict.fromkeys(
    [
        *(*range(9), 11, 12, *range(14, 32), *range(127, 160)),
        *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    ]
)


def render_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    The page needs no network and no other file; the same records give the same bytes.

    Raises:
        BadInput: the folder holds no run.
    """
    target = RunFolder(folder).report_html
    # Lone surrogates, which JSON strings may hold, have no UTF-8: they become question marks.
    write_atomically(target, report_page(read_evidence(folder)).encode("utf-8", "replace"))
    return target


def report_page(evidence: Evidence) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(significant=significant)
    style, script = _asset("style.css"), _asset("script.js")
    run = evidence.run
    counter_columns, counter_rows = pages.engine_counters(evidence)
    quality_columns, quality_rows = quality_table(evidence)
    page = environment.get_template("report.html.j2").render(
        style=Markup(style),  # noqa: S704  our own file
        script=Markup(script),  # noqa: S704  our own file
        style_hash=_hash(style),
        script_hash=_hash(script),
        run_json=_finite(run),
        model=str(mapping(run.get("model")).get("name") or "unnamed model"),
        hardware=str(mapping(run.get("hardware")).get("name") or ""),
        started=moment(run.get("started_at")),
        objective=str(run.get("objective") or "objective"),
        has_slo=bool(run.get("slo")),
        verdict=judge(evidence),
        single=evidence.is_single,
        sides=evidence.sides,
        latency=latency_distributions(evidence),
        percentiles=percentile_rows(evidence),
        throughput=throughput_comparison(evidence),
        finalists=finalist_gains(evidence),
        counter_columns=counter_columns,
        counter_rows=counter_rows,
        frontier=speed_against_quality(evidence),
        quality_columns=quality_columns,
        quality_rows=quality_rows,
        roofline=roofline(evidence.profile),
        breakdown=time_breakdown(evidence.profile),
        phase_columns=PHASE_COLUMNS,
        phase_rows=phase_rows(evidence.profile),
        profile_facts=profile_facts(evidence.profile),
        profile_notes=partial_notes(evidence.profile),
        binding=binding_sentence(evidence.diagnosis),
        findings=findings_by_metric(evidence.diagnosis),
        unjudged=unjudged(evidence.diagnosis),
        advice=advice_rows(evidence.advice),
        first=first_advice(evidence.advice),
        # After a search it is the winner that tells; the advice was of the default.
        infeasible=infeasible_rows(
            evidence.result if "infeasible" in evidence.result else evidence.advice
        ),
        advice_notes=[str(note) for note in sequence(evidence.advice.get("notes"))],
        scoreboard=scoreboard_figure(mapping(evidence.result.get("scoreboard"))),
        notes=pages.run_notes(evidence),
        history=search_history(evidence),
        importances=knob_importances(evidence),
        slices=knob_slices(evidence),
        search_space=pages.search_space(evidence),
        table=trial_table(evidence),
        timeline=engine_timeline(evidence),
        workload=pages.workload_facts(evidence),
        workload_notes=pages.workload_notes(evidence),
        workload_lengths=pages.workload_lengths(evidence),
        workload_shape=workload_histograms(evidence),
        environment=pages.environment_facts(evidence),
        snippets=pages.reproduction(evidence),
        glossary=pages.GLOSSARY,
    )
    return page.translate(_INVISIBLE)


def _asset(name: str) -> str:
    return files("reports").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression by which the page's policy admits its own style and script only."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
