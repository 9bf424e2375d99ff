"""From the default's trial to advice: what the search begins with, and what it need not try.

The parts of a step are timed in the trial process, which holds the model; profile, diagnosis,
prediction and advice are made here and written into the run folder, so that a resumed run reads
what it was advised and does not find out anew.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autotune.profiling.file import read_profile, write_profile
from autotune.profiling.schema import Source
from autotune.records import RunFolder, TrialRecord, utc_now
from autotune.search.advised_space import AdvisedSpace, advised_space
from autotune.search.events import Listener
from autotune.search.prepare import Prepared
from autotune.search.probing import Probing, share_s, why_no_probes
from autotune.search.spending import Spending
from engine.config import EngineConfig

if TYPE_CHECKING:
    from autotune.advise.advice import AdviceList
    from autotune.diagnose.finding import Diagnosis
    from autotune.predict.predictor import Predictor
    from autotune.profiling.machine import MachineCalibration
    from autotune.profiling.schema import Profile

# With a long budget, or none, more is of no use.
MAX_PREDICTION_S = 30.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a trial's records say and advise; `irrelevant` says why a knob cannot matter."""

    profile: Profile
    diagnosis: Diagnosis
    advice: AdviceList
    irrelevant: Mapping[str, str]


def advise_search(
    prepared: Prepared,
    folder: RunFolder,
    probing: Probing,
    listener: Listener,
    spending: Spending,
    searched: Sequence[TrialRecord],
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The advice that follows from the default's trial, as it stands in `advice.json`.

    Made once: `run.json` then says under `advice` that it was, and holds the space that follows
    from it. What takes advice's place where there is none is a note.

    Raises:
        Interrupted: the search was stopped.
    """
    if not prepared.options.advice:
        return []
    if "advice" in prepared.run:
        return _read_advice(folder, prepared, note)
    began = time.monotonic()
    share = share_s(prepared)
    reason = why_no_probes(spending, searched[0], share)
    drawn = None
    if reason is None:
        left = spending.left()
        listener.phase("advice", left, None)
        machine = probing.machine(share)
        prediction_s = min(MAX_PREDICTION_S, share - min(share / 2, time.monotonic() - began))
        try:
            drawn = draw_up_advice(prepared, folder, searched[0], machine, prediction_s)
        except Exception as error:  # the search, and what was measured, must not be lost to it
            reason = f"a fault of ours ({traced(folder, error)})"
    if reason is not None:
        note(f"the search begins without advice: {reason}")
    advice: list[dict[str, Any]] = []
    space: AdvisedSpace | None = None
    if drawn is not None:
        advice = _keep(folder, drawn)
        space = _follow(prepared, advice, drawn.irrelevant, note)
    prepared.run["advice"] = {
        "given": drawn is not None,
        "reason": reason,
        "seconds": time.monotonic() - began,
        "fixed": {} if space is None else dict(space.fixed),
        "opened": {} if space is None else {n: list(v) for n, v in space.opened.items()},
    }
    prepared.run["notes"] = prepared.notes
    folder.write_json(folder.run_json, prepared.run)
    if drawn is not None:
        listener.advised(drawn.diagnosis.to_json()["findings"], advice)
    return advice


def draw_up_advice(
    prepared: Prepared,
    folder: RunFolder,
    trial: TrialRecord,
    machine: MachineCalibration | None,
    prediction_s: float,
) -> Drawn:
    """Profile a trial and advise on it; predictions take about `prediction_s` seconds."""
    from autotune.advise.advise import advise
    from autotune.advise.commands import traffic_arguments
    from autotune.advise.relevance import irrelevant_knobs
    from autotune.diagnose.diagnose import diagnose

    profile, predictor = _profile(prepared, folder, trial, machine, prediction_s)
    diagnosis = diagnose(profile)
    advice = advise(
        profile,
        diagnosis,
        predictor,
        slo=prepared.options.parsed_slo,
        offer=prepared.offer,
        workload=traffic_arguments(prepared.run["command"]),
    )
    # Each trial of a search for the highest rate bears another load than the default's.
    fixed = irrelevant_knobs(profile, load_fixed=prepared.options.objective != "capacity")
    return Drawn(profile, diagnosis, advice, fixed)


def infeasible_winner(
    prepared: Prepared,
    folder: RunFolder,
    result: Mapping[str, Any],
    advice: Sequence[Mapping[str, Any]],
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Which limits the winner cannot keep, why, and what would be enough instead.

    Of the advice, what could not be tried here is judged again, for the winner. Empty where the run
    had no profile: the bounds are those of measured ceilings.
    """
    numbers = result["winner_trials"]
    trial = next((t for t in folder.read_trials() if t.number in numbers and t.metrics), None)
    if trial is None or not folder.profile_json.exists():
        return []
    try:
        from autotune.advise.advise import advise
        from autotune.advise.table import load_table
        from autotune.diagnose.diagnose import diagnose
        from autotune.profiling.machine import MachineCalibration

        known = read_profile(folder.profile_json)
        machine = None
        if known.ceilings is not None and known.probes is not None:
            machine = MachineCalibration(known.ceilings, known.probes)
        profile, predictor = _profile(prepared, folder, trial, machine, MAX_PREDICTION_S / 3)
        untried = {item["technique"] for item in advice if not item["testable"]}
        table = load_table()
        rows = [row for row in table.techniques if row.id in untried]
        found = advise(
            profile,
            diagnose(profile),
            predictor,
            slo=prepared.options.parsed_slo,
            offer=prepared.offer,
            table=table.model_copy(update={"techniques": rows}),
            searched=True,
        )
        return [asdict(item) for item in found.infeasible]
    except Exception as error:  # the verdict stands without it
        note(f"what the SLO would need is not known, a fault of ours ({traced(folder, error)})")
        return []


def traced(folder: RunFolder, error: Exception) -> str:
    """Keep a fault's traceback where the trial process keeps its own; returns what to say of it."""
    log = folder.path / "trials.log"
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}; {log.name} has its traceback"


def _profile(
    prepared: Prepared,
    folder: RunFolder,
    trial: TrialRecord,
    machine: MachineCalibration | None,
    prediction_s: float,
) -> tuple[Profile, Predictor]:
    from autotune.predict.predictor import predictor_for
    from autotune.profiling.build import build_profile
    from autotune.profiling.evidence import read_evidence
    from autotune.profiling.model_facts import model_facts

    options = prepared.options
    config = EngineConfig.from_mapping(trial.config)
    evidence = read_evidence(folder, trial.number)
    profile = build_profile(
        evidence,
        config,
        source=Source(kind="records", where=str(folder.path), trial=trial.number),
        metrics=trial.metrics,
        model=model_facts(config),
        hardware=prepared.run["hardware"],
        slo=str(options.parsed_slo),
        price=options.price,
        machine=machine,
        created_at=utc_now(),
    )
    predictor = predictor_for(
        profile, evidence, options.parsed_slo, seed=options.seed, budget_s=prediction_s
    )
    return profile, predictor


def _keep(folder: RunFolder, drawn: Drawn) -> list[dict[str, Any]]:
    """Put what was found on disk; returns the advice as a resumed run will read it."""
    write_profile(folder.profile_json, drawn.profile)
    folder.write_json(folder.diagnosis_json, drawn.diagnosis.to_json())
    body = json.loads(json.dumps(drawn.advice.to_json()))
    folder.write_json(folder.advice_json, body)
    advice: list[dict[str, Any]] = body["advice"]
    return advice


def _follow(
    prepared: Prepared,
    advice: Sequence[Mapping[str, Any]],
    irrelevant: Mapping[str, str],
    note: Callable[[str], None],
) -> AdvisedSpace | None:
    """Change the search space as advised; a file of the user's own stays as it is."""
    options = prepared.options
    if options.space_file is not None:
        return None
    asked_for = set(options.narrowing)
    space = advised_space(
        prepared.space, prepared.base, advice, irrelevant, prepared.offer, asked_for
    )
    for sentence in space.notes:
        note(sentence)
    prepared.space = space.space
    prepared.run["search_space"] = {n: list(v) for n, v in space.space.values.items()}
    return space


def _read_advice(
    folder: RunFolder, prepared: Prepared, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    if not prepared.run["advice"].get("given"):
        return []
    try:
        advice: list[dict[str, Any]] = json.loads(folder.advice_json.read_text("utf-8"))["advice"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        note(f"{folder.advice_json.name} cannot be read, so the search goes on without: {error}")
        return []
    return advice
