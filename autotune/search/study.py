"""The sampler: Optuna asked and told, over the trials that are on disk.

`trials.jsonl` is the truth; the Optuna journal is rebuilt from it when a run is resumed, so that a
journal torn by a crash cannot lose or invent a trial, and the same records give the same
suggestions.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autotune.records import TrialRecord
from autotune.search.configuration import C, Space
from autotune.search.objective import Objective
from autotune.search.options import SamplerName

STUDY_NAME = "autotune"
# Violation told to the sampler for a trial that crashed, ran out of memory or timed out: worse
# than any measured violation is likely to be, so such points are ranked last.
FAILURE_VIOLATION = 100.0
# Of a trial that offered no full load because its quality broke the SLO, or as a short one was
# enough: to be avoided like a miss of a limit, not like a crash. It keeps such trials out of what
# importances are computed from.
UNOFFERED_VIOLATION = 1.0
# Stands for the objective of a trial that measured none when less is better. Infeasible trials are
# ranked by their violation, so its size does not matter as long as it is finite.
UNMEASURED_COST = 1e9


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A point to measure, why, and the Optuna trial that waits for the answer."""

    point: Mapping[str, Any]
    source: str
    trial: Trial


class Study(Generic[C]):
    """Suggests points of a space and learns from measured trials.

    Args:
        journal: path of the Optuna journal; replaced.
        space: where to look.
        objective: gives the direction.
        seed: drives the sampler.
        records: search trials that ended before, in order.
        base: the config whose other knobs every trial shares.
        sampler: Optuna's: `random`, or else `tpe`.
    """

    def __init__(
        self,
        journal: Path,
        space: Space[C],
        objective: Objective,
        seed: int,
        records: Iterable[TrialRecord],
        base: C,
        sampler: SamplerName = "tpe",
    ) -> None:
        self._sampler = sampler
        self._space = space
        self._base = base
        self._objective = objective
        self._seed = seed
        self._told = 0
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1)
            if space.is_ordinal(name)
            else CategoricalDistribution(values)
            for name, values in space.values.items()
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.unlink(missing_ok=True)
        self._study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            direction=objective.direction,
        )
        for record in records:
            point = space.point_in(record.config, base)
            if point is not None:
                self._study.add_trial(self._frozen(point, record))
                self._told += 1

    def enqueue(self, source: str, point: Mapping[str, Any]) -> None:
        """Have a point measured before the sampler is asked; one known already is left out."""
        self._study.enqueue_trial(
            self._encode(point), user_attrs={"source": source}, skip_if_exists=True
        )

    def ask(self) -> Suggestion:
        """The next point: enqueued ones first, then the sampler's."""
        # Reseeded by what it knows: a resumed run asks as the uninterrupted one would have.
        seed = self._seed * 1_000_003 + self._told
        self._study.sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if self._sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask(self._distributions)
        self._told += 1
        source = str(trial.user_attrs.get("source", "sampler"))
        drawn = self._decode(trial.params)
        point = self._space.normalised(drawn, self._base)
        if point != drawn:
            # The sampler learns of the point that is measured, as it does from the records of a
            # run that is resumed; what it drew instead it never sees again.
            self._study.tell(trial, state=TrialState.FAIL)
            self._study.enqueue_trial(self._encode(point))
            trial = self._study.ask(self._distributions)
        return Suggestion(point=point, source=source, trial=trial)

    def take(self, source: str, point: Mapping[str, Any]) -> Suggestion:
        """A point that somebody else chose; nothing else may be enqueued then."""
        self._study.enqueue_trial(self._encode(point), user_attrs={"source": source})
        return self.ask()

    def tell(self, suggestion: Suggestion, record: TrialRecord) -> None:
        """Report a measured trial; one that failed is told as complete and infeasible."""
        suggestion.trial.set_user_attr("trial", record.number)
        for name, violation in constraints_of(record).items():
            suggestion.trial.set_constraint(name, violation)
        self._study.tell(suggestion.trial, self._value(record))

    def forget(self, suggestion: Suggestion) -> None:
        """Leave out a point that is not measured."""
        self._study.tell(suggestion.trial, state=TrialState.FAIL)

    def importances(self) -> dict[str, float]:
        """Share of the objective's variation that each knob explains, over trials that measured it.

        PED-ANOVA (Watanabe et al. 2023, through Optuna); empty with fewer than 5 such trials, or
        where nothing varied.
        """
        # A point that was suggested again was told again, and measured once.
        told = {
            t.user_attrs["trial"]: t
            for t in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        }
        measured = [t for t in told.values() if t.constraints.get("outcome", 0.0) <= 0.0]
        if len(measured) < 5 or len({t.value for t in measured}) < 2:
            return {}
        study = optuna.create_study(direction=self._objective.direction)
        study.add_trials([self._with_idle_knobs_drawn(trial) for trial in measured])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return dict(optuna.importance.get_param_importances(study))
        except (ValueError, RuntimeError):
            return {}

    def _with_idle_knobs_drawn(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial with values drawn by its number for knobs that did nothing in it.

        At the default's value, idle knobs would seem to explain what not drafting brought.
        """
        point = self._decode(trial.params)
        values = {**self._base.to_dict(), **point}
        rng = random.Random(trial.user_attrs["trial"])
        drawn = {
            name: rng.choice(choices) if self._space.idle(name, values) else point[name]
            for name, choices in self._space.values.items()
        }
        return create_trial(
            value=trial.value,
            params=self._encode(drawn),
            distributions=self._distributions,
            constraints=trial.constraints,
        )

    def _value(self, record: TrialRecord) -> float:
        if record.objective is not None:
            return record.objective
        return 0.0 if self._objective.maximise else UNMEASURED_COST

    def _frozen(self, point: Mapping[str, Any], record: TrialRecord) -> FrozenTrial:
        return create_trial(
            value=self._value(record),
            params=self._encode(point),
            distributions=self._distributions,
            user_attrs={"trial": record.number, "source": record.source},
            constraints=constraints_of(record),
        )

    def _encode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self._space.values[name].index(value) if self._space.is_ordinal(name) else value
            for name, value in point.items()
        }

    def _decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self._space.values[name][value] if self._space.is_ordinal(name) else value
            for name, value in params.items()
        }


def constraints_of(record: TrialRecord) -> dict[str, float]:
    """Constraints of a trial, at most 0 where met: its outcome and each limit of the SLO."""
    outcomes = {"ok": 0.0, "quality": UNOFFERED_VIOLATION, "cut_short": UNOFFERED_VIOLATION}
    constraints = {"outcome": outcomes.get(record.outcome, FAILURE_VIOLATION)}
    constraints |= {result.limit: result.violation for result in record.slo}
    return constraints


def combined_improvements(
    default: TrialRecord,
    records: Sequence[TrialRecord],
    space: Space[Any],
    objective: Objective,
) -> dict[str, Any] | None:
    """The point that joins the changes that beat the default, of those of a knob the best.

    One-at-a-time measurements often add up; the sampler would need many trials to find that out.
    A change may be of several knobs that belong together. None if fewer than two changes helped.
    """
    helped: list[tuple[float, int, list[str], Mapping[str, Any]]] = []
    start = {name: default.config[name] for name in space.values}
    reference = default.objective if default.objective is not None else 0.0
    for record in records:
        changed = [n for n in space.values if record.config[n] != start[n]]
        if not changed or record.objective is None or record.outcome != "ok":
            continue
        # What breaks the promise further helps nobody, however good its objective.
        if record.missed > default.missed:
            continue
        sign = 1.0 if objective.maximise else -1.0
        gain = sign * (record.objective - reference)
        if gain > 0:
            helped.append((gain, record.number, changed, record.config))
    joined: dict[str, Any] = {}
    changes = 0
    for _, _, changed, config in sorted(helped, key=lambda change: (-change[0], change[1])):
        if not any(name in joined for name in changed):
            joined |= {name: config[name] for name in changed}
            changes += 1
    return {**start, **joined} if changes >= 2 else None
