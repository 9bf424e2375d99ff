"""Which rows of the technique table a diagnosis calls for, and how they can be judged."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autotune.advise.advice import Effort
from autotune.advise.facts import Facts
from autotune.advise.table import KnobSetting, Table, Technique, factor_of, knob_values
from autotune.diagnose.finding import Diagnosis, Finding
from autotune.predict.change import Change, Factor, Term
from autotune.profiling.schema import Profile
from autotune.search.methods_offered import speed_class
from autotune.speculative_models import folder_for
from engine.config import KNOBS, MODEL_METHODS, EngineConfig
from engine.errors import ConfigError
from engine.quantize.method_table import METHODS

# Findings below this share of their metric, weighed, call for nothing.
LEAST_SEVERITY = 0.05
# Findings at least so severe make a symptom: `Finding.level` calls them medium.
SYMPTOM_SEVERITY = 0.2
# Knobs that say among how many devices the model is divided or copied.
_DEVICES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
)
# Knobs whose effect is not the scheduler's and not among what the probes measure.
_UNMEASURED = ("cuda_graphs", "tensor_parallel_size", "num_threads", "gpu_memory_utilization")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that is called for: the findings it answers, worst first, and as what."""

    row: Technique
    findings: tuple[Finding, ...]
    role: Literal["primary", "secondary"]

    @property
    def severity(self) -> float:
        """Severity of the worst finding that it answers."""
        return self.findings[0].severity


def candidates(facts: Facts, table: Table) -> tuple[list[Candidate], dict[str, list[str]]]:
    """Rows whose bottlenecks were found and whose conditions hold, in the table's order.

    Beside them the rows that could not be judged, each with the facts that it would take.
    """
    called, unjudged = [], {}
    for row in table.techniques:
        answers = {*row.primary_for, *row.secondary_for}
        found = [
            f
            for f in facts.diagnosis.findings
            if f.bottleneck in answers and f.severity >= LEAST_SEVERITY
        ]
        if not found:
            continue
        holds = True if row.when is None else row.when.holds(facts)
        if holds is None:
            assert row.when is not None
            unjudged[row.id] = row.when.unknown(facts)
        if holds:
            found.sort(key=lambda f: (f.metric != facts.diagnosis.binding, -f.severity))
            primary = any(f.bottleneck in row.primary_for for f in found)
            called.append(Candidate(row, tuple(found), "primary" if primary else "secondary"))
    return called, unjudged


def symptoms(diagnosis: Diagnosis, table: Table) -> list[str]:
    """Names of the symptoms that a diagnosis shows, in the table's order."""
    return [
        name
        for name, symptom in table.symptoms.items()
        if any(
            f.metric in symptom.metrics
            and f.bottleneck in symptom.bottlenecks
            and f.severity >= SYMPTOM_SEVERITY
            for f in diagnosis.findings
        )
    ]


def variants(row: Technique, facts: Facts) -> list[dict[str, Any]]:
    """Knobs that the row would set, one mapping for each value worth judging.

    A combination that the engine refuses is left out. A row without knobs has one empty variant.
    """
    lists = {name: knob_values(name, setting, facts) for name, setting in row.knobs.items()}
    combined = [
        dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
    ]
    base = base_config(facts)
    return [knobs for knobs in combined if base is None or not refused(base, knobs)]


def base_config(facts: Facts) -> EngineConfig | None:
    """The config that was profiled; None where it is another server's."""
    return profiled_config(facts.profile)


def profiled_config(profile: Profile) -> EngineConfig | None:
    """The config that a profile is of; None where it is another server's."""
    values = profile.engine_config
    if values is None:
        return None
    try:
        return EngineConfig.from_mapping({k: v for k, v in values.items() if k in KNOBS})
    except ConfigError:
        return None


def refused(base: EngineConfig, knobs: Mapping[str, Any]) -> str | None:
    """Why the engine would refuse the base config with these knobs; None: it would not.

    For want of a speculative model it is not refused here: that is `why_not_testable`.
    """
    known = {name: value for name, value in knobs.items() if name in KNOBS}
    try:
        base.replace(**{"speculative_model": "any folder", **known, **drafting_model(base, known)})
    except ConfigError as error:
        return str(error)
    return None


def drafting_model(base: EngineConfig, knobs: Mapping[str, Any]) -> dict[str, str]:
    """The folder that the knobs' speculative method would use, as a knob; empty without one."""
    method = knobs.get("speculative_method")
    folder = folder_for(method, base) if method in MODEL_METHODS else None
    return {} if folder is None else {"speculative_model": folder}


def why_not_testable(row: Technique, knobs: Mapping[str, Any], facts: Facts) -> str | None:
    """Why the bundled engine cannot measure a row on the profiled device; None: it can."""
    if row.outside_reach is not None:
        return row.outside_reach
    strange = [name for name in knobs or row.knobs if name not in KNOBS]
    if strange:
        return f"the bundled engine has no knob {strange[0]}"
    base, device = base_config(facts), facts.get("device")
    if base is None or facts.profile.source.kind == "metrics":
        return "the profile is of another server, which this tool does not start"
    if not knobs:
        return "the knobs have these values already, or cannot have better ones here"
    for name, value in knobs.items():
        if device is not None and device not in KNOBS[name].devices:
            return f"{name} has no effect on {device}"
        offered = None if facts.offer is None else facts.offer.values.get(name)
        if offered is not None and value not in offered:
            assert facts.offer is not None
            return facts.offer.why_not(name, value)
    gpus = facts.number("gpus")
    ranks = knobs.get("tensor_parallel_size", 1)
    if ranks > 1 and gpus is not None and gpus < ranks:
        return f"it takes {ranks} GPUs; {gpus:.0f} {'is' if gpus == 1 else 'are'} here"
    return None


def effort_here(row: Technique, knobs: Mapping[str, Any], facts: Facts) -> Effort:
    """What a row takes; where it needs more GPUs than there are, hardware.

    Speculation whose model is at hand takes loading it.
    """
    base = base_config(facts)
    if base is not None and drafting_model(base, knobs):
        return "reload"
    gpus = facts.number("gpus")
    needed = max((int(knobs[name]) for name in _DEVICES if name in knobs), default=0)
    return "buy" if gpus is not None and gpus < needed else row.effort


def changes_of(
    row: Technique, knobs: Mapping[str, Any], facts: Facts, *, testable: bool, replayed: bool
) -> list[Change]:
    """The change as a prediction may understand it, the best founded first.

    Knobs by themselves where the probes or the replayed scheduler tell what they bring about; then
    with the table's effects; at last these alone, which a prediction takes at their word.
    """
    base = base_config(facts)
    model = {} if base is None else drafting_model(base, knobs)
    usable = {**knobs, **model} if testable else {}
    factors: dict[Term, Factor] = {}
    for term, effect in row.effects.items():
        factor = factor_of(effect, facts)
        if factor is not None:
            factors[term] = factor
    changes = [Change(knobs=usable, factors=factors), Change(factors=factors)]
    if usable and replayed and all(_is_measured(k, v, facts) for k, v in usable.items()):
        changes.insert(0, Change(knobs=usable))
    return [change for change in changes if change.knobs or change.factors]


def fill(text: str, facts: Facts) -> str | None:
    """A sentence with the facts that it names in braces; None if one is not known."""
    parts = []
    for literal, name, form, _ in string.Formatter().parse(text):
        parts.append(literal)
        if name is not None:
            value = facts.get(name)
            if value is None:
                return None
            parts.append(format(value, form or ""))
    return "".join(parts)


def open_values(
    row: Technique,
    knobs: Mapping[str, Any],
    facts: Facts,
    spoilt: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Values worth a search: what the row opens, and every value that it would have set.

    Those of the settings in `spoilt` are left out, but for what `knobs` sets.
    """
    opened: dict[str, tuple[Any, ...]] = {}
    settings: dict[str, KnobSetting | list[Any]] = {**row.knobs, **row.opens}
    for name, setting in settings.items():
        if name not in KNOBS:
            continue
        values = knob_values(name, setting, facts)
        now = facts.get(f"config.{name}")
        mine = [knobs[name]] if name in knobs else []
        bad = [setting[name] for setting in spoilt if name in setting]
        values = [value for value in values if value not in bad]
        offered = None if facts.offer is None else facts.offer.values.get(name)
        kept = [v for v in (now, *mine, *values) if v is not None]
        opened[name] = tuple(
            v for v in dict.fromkeys(kept) if offered is None or v in offered or v == now
        )
    return {name: values for name, values in opened.items() if len(values) > 1}


def _is_measured(knob: str, value: Any, facts: Facts) -> bool:
    """Whether the probes or the replayed scheduler know what a knob does."""
    if knob in _UNMEASURED:
        return False
    probes = facts.profile.probes
    if knob == "quantization":
        known = (
            {speed_class(p.method) for p in probes.linears if p.method in METHODS}
            if probes
            else set()
        )
        return speed_class(value) in known
    if knob == "kv_cache_dtype":
        return probes is not None and value in {p.kv_cache_dtype for p in probes.attention}
    return True
