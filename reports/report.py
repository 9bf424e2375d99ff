"""`render_report`: a folder of records in, one HTML file out."""

from __future__ import annotations

from pathlib import Path

from autotune.records import RunFolder
from reports import pages
from reports.advice import advice_rows, first_advice, infeasible_rows
from reports.charts.acceptance import acceptance_by_position
from reports.charts.breakdown import time_breakdown
from reports.charts.calibration_scatter import calibration_scatter
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
from reports.charts.speculative_gain import speculative_gain
from reports.charts.timeline import engine_timeline
from reports.evidence import Evidence, read_evidence, read_json
from reports.findings import binding_sentence, findings_by_metric, unjudged
from reports.formatting import mapping, moment, sequence
from reports.page import finite, render_page, write_page
from reports.plan.page import plan_page
from reports.predictions import error_rows, prediction_sentence, read_pairs
from reports.profile import PHASE_COLUMNS, partial_notes, phase_rows, profile_facts
from reports.quality import quality_table
from reports.simulation import simulation_page
from reports.speculation import drafts_table, dry_run_facts, read_drafts
from reports.trials import trial_table
from reports.verdict import judge
from reports.with_and_without import PAIR_COLUMNS, pair_rows, with_and_without


def render_report(folder: Path) -> Path:
    """Write `report.html` into a folder of a run, a plan or a simulation; return its path.

    A run may be unfinished. The page needs no network and no other file; the same records give the
    same bytes.

    Raises:
        BadInput: the folder holds none of them.
    """
    files = RunFolder(folder)
    if files.plan_json.is_file() and not files.run_json.exists():
        page = plan_page(files.read_plan())
    else:
        evidence = read_evidence(folder)
        if evidence.run.get("kind") == "simulate":
            page = simulation_page(evidence.run, read_json(folder / "simulation.json"))
        else:
            page = report_page(evidence)
    return write_page(files.report_html, page)


def report_page(evidence: Evidence) -> str:
    """The whole page of a run."""
    run = evidence.run
    counter_columns, counter_rows = pages.engine_counters(evidence)
    quality_columns, quality_rows = quality_table(evidence)
    pairs = read_pairs(evidence)
    drafts = read_drafts(evidence)
    draft_columns, draft_rows = drafts_table(drafts)
    return render_page(
        "report.html.j2",
        run_json=finite(run),
        model=str(mapping(run.get("model")).get("name") or "unnamed model"),
        hardware=str(mapping(run.get("hardware")).get("name") or ""),
        started=moment(run.get("started_at")),
        other_engine=str(mapping(run.get("engine")).get("title") or ""),
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
        draft_columns=draft_columns,
        draft_rows=draft_rows,
        acceptance=acceptance_by_position(drafts),
        speculative_gain=speculative_gain(drafts),
        pair_columns=PAIR_COLUMNS,
        pair_rows=pair_rows(with_and_without(evidence)),
        dry_run=dry_run_facts(evidence.profile),
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
        predicted=prediction_sentence(pairs),
        calibration=calibration_scatter(pairs),
        prediction_errors=error_rows(pairs),
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
