"""What measures a search's trials whatever engine it tunes: the default, then what was chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from autotune.records import RunFolder, TrialRecord
from autotune.search.events import Listener
from autotune.search.prepare import Preparation
from autotune.search.proof import ranked
from autotune.search.spending import Spending
from autotune.search.study import Study
from autotune.search.trials import TrialRunner

# The space counts as exhausted after so many suggestions in a row that were measured before.
MAX_REPEATS = 50
P = TypeVar("P", bound=Preparation)


class Explorer(ABC, Generic[P]):
    """Measures points of the space until the budget or the space ends.

    Args:
        prepared: what the run works with.
        folder: the run.
        listener: told of each trial.
        trials: measures.
        spending: says how long to go on.
        searched: search trials so far; each is added as it ends.
        note: keeps a note for the result and tells it.
    """

    def __init__(
        self,
        prepared: P,
        folder: RunFolder,
        listener: Listener,
        trials: TrialRunner,
        spending: Spending,
        searched: list[TrialRecord],
        note: Callable[[str], None],
    ) -> None:
        self._prepared = prepared
        self._options = prepared.options
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        self._folder = folder
        self._listener = listener
        self._trials = trials
        self._spending = spending
        self._searched = searched
        self._note = note
        self._opened_study: Study[Any] | None = None

    def measure_default(self) -> None:
        """Measure the default, to which every claim compares, whatever happens later."""
        if self._searched:
            return
        self._tell_phase()
        start = self._prepared.space.point_in({}, self._prepared.base)
        assert start is not None, "the space is widened by the default first"
        self._measure("default", start)

    def importances(self) -> dict[str, float]:
        """What each knob explains of the objective; see `Study.importances`."""
        return self._study().importances() if self._searched else {}

    def best(self) -> TrialRecord | None:
        """The best search trial so far."""
        return next(iter(ranked(self._searched, self._objective)), None)

    @abstractmethod
    def _measure(
        self, source: str, point: Mapping[str, Any], predicted: Mapping[str, Any] | None = None
    ) -> TrialRecord:
        """Measure a point, tell of it and keep its record among those searched."""

    def _study(self) -> Study[Any]:
        """The sampler, which knows the trials on disk; opened when it is first asked."""
        if self._opened_study is None:
            self._opened_study = Study(
                self._folder.journal,
                self._prepared.space,
                self._objective,
                self._options.seed,
                self._searched,
                self._prepared.base,
                self._options.sampler,
            )
        return self._opened_study

    def _tell_phase(self) -> None:
        left = max(0, self._spending.expected_trials() - len(self._searched))
        self._listener.phase("search", self._spending.left(), left)

    def _known(
        self, point: Mapping[str, Any], records: Sequence[TrialRecord] | None = None
    ) -> TrialRecord | None:
        """The trial that measured a point, among these records or all searched."""
        for record in self._searched if records is None else records:
            if all(record.config.get(name) == value for name, value in point.items()):
                return record
        return None
