"""What a search does whatever engine it tunes: find the rate, prove the winner, tell the result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from autotune.errors import Interrupted
from autotune.records import RunFolder, TrialRecord
from autotune.search.configuration import Configuration
from autotune.search.evaluator import TrialEvaluator
from autotune.search.events import Listener
from autotune.search.explorer import Explorer, P
from autotune.search.prepare import conclude, offer_traffic
from autotune.search.proof import Contender, choose_finalists, judge
from autotune.search.spending import Spending
from autotune.search.trials import TrialRunner
from autotune.search.verdict import changed_knobs


class Session(ABC, Generic[P]):
    """One run under way, which this process began to work on when `clock` said `began`.

    What is on disk already is not measured again, so that a run goes on where it was.

    Args:
        prepared: what the search works with.
        folder: where the records are.
        evaluator: measures.
        listener: told of progress.
        clock: seconds.
        began: when this process began.
        bundled: whether configs are the bundled engine's; another one is started for every trial.
        earlier_s: what earlier processes took beside their trials.
    """

    _exploration: Explorer[P]

    def __init__(
        self,
        prepared: P,
        folder: RunFolder,
        evaluator: TrialEvaluator,
        listener: Listener,
        clock: Callable[[], float],
        began: float,
        *,
        bundled: bool,
        earlier_s: float = 0.0,
    ) -> None:
        self._prepared = prepared
        self._options = prepared.options
        self._folder = folder
        self._evaluator = evaluator
        self._listener = listener
        self._bundled = bundled
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        self._at_once = prepared.options.traffic.rate == math.inf
        earlier = folder.read_trials()
        self._calibration = [t for t in earlier if t.kind == "calibration"]
        self._searched = [t for t in earlier if t.kind == "search"]
        self._proof = [t for t in earlier if t.kind == "proof"]
        self._spending = Spending(
            prepared.schedule,
            prepared.options.trials,
            lambda: clock() - began,
            sum(t.seconds for t in earlier) + earlier_s,
            self._searched,
            self._proof,
            first_is_typical=not bundled,
        )
        self._trials = TrialRunner(
            folder,
            evaluator,
            self._slo,
            self._objective,
            prepared.schedule,
            prepared.options.seed,
            next_number=1 + max((t.number for t in earlier), default=-1),
            at_once=self._at_once,
            clock=clock,
        )

    def play(self) -> None:
        """Measure all that is not on disk yet, and write the outcome into `run.json`.

        Raises:
            Interrupted: the search was stopped; `run.json` says so.
        """
        run = self._prepared.run
        try:
            self._offer_traffic()
            self._search()
            self._prove()
            self._listener.phase("done", None, None)
        except Interrupted:
            # Before the proof there is a best trial, which the records tell, but no result.
            result = self.result() if self.proof_has_intervals else None
            conclude(self._folder, run, "interrupted", result)
            raise
        conclude(self._folder, run, "done", self.result())

    @abstractmethod
    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if nothing could be measured."""

    @abstractmethod
    def _search(self) -> None:
        """Measure the default and what may be better, as far as it is not on disk."""

    @abstractmethod
    def _proof_order(self, contenders: Sequence[TrialRecord], round_: int) -> list[TrialRecord]:
        """In which order the contenders run in a round of the proof."""

    @abstractmethod
    def _config(self, values: Mapping[str, Any]) -> Configuration:
        """The configuration of a trial's record."""

    def _foretold(self, config: Configuration, window: int) -> dict[str, Any] | None:
        """What a trial of the proof is expected to measure; None if it is not told."""
        del config, window
        return None

    def _judged(self) -> list[Contender] | None:
        """The default and the finalists by what was measured; None if nothing was."""
        if not self._searched:
            return None
        configs = [t.config for t in self._contenders()]
        # Without a proof the search's own trials are shown, and nothing counts as proven.
        trials = self._proof or [t for t in self._searched if t.config in configs]
        contenders = judge(
            self._folder,
            configs,
            trials,
            slo=self._slo,
            objective=self._objective,
            confidence=self._options.confidence,
            seed=self._options.seed,
            bundled=self._bundled,
        )
        return None if all(c.metrics is None for c in contenders) else contenders

    @property
    def proof_has_intervals(self) -> bool:
        """Whether every contender was measured in at least two rounds of the proof."""
        if not self._searched:
            return False
        proof = self._proof
        return all(sum(t.config == c.config for t in proof) >= 2 for c in self._contenders())

    def _contenders(self) -> list[TrialRecord]:
        """The default's trial and the finalists'."""
        count = self._options.finalists
        finalists = choose_finalists(self._searched, self._objective, count, self._slo)
        return [self._searched[0], *finalists]

    def _offer_traffic(self) -> None:
        """Find the rate if it is to be measured, and put the windows on disk."""
        prepared = self._prepared
        if prepared.run.get("workload"):
            return
        for note in prepared.notes:
            self._listener.note(note)
        told = len(prepared.notes)
        saturated = None
        if self._options.traffic.rate_is_measured:
            if not self._calibration:
                self._listener.phase("calibration", self._spending.left(), 1)
                offer_traffic(self._folder, prepared, saturated=None)
                number = self._trials.next_number
                self._listener.trial_started(number, "all requests at once", {})
                record = self._trials.run("calibration", "calibration", prepared.base)
                self._calibration.append(record)
                self._listener.trial_ended(record, None)
            saturated = self._calibration[-1]
        offer_traffic(self._folder, prepared, saturated=saturated, final=True)
        for note in prepared.notes[told:]:
            self._listener.note(note)

    def _prove(self) -> None:
        contenders = self._contenders()
        rounds = self._options.rounds
        self._listener.phase("proof", self._spending.left(), rounds * len(contenders))
        done = {(t.round, str(t.config)) for t in self._proof}
        for round_ in range(rounds):
            begun = any(t.round == round_ for t in self._proof)
            if not begun and not self._spending.pays_for_round(round_, len(contenders)):
                self._note(f"the budget paid for {round_} of {rounds} rounds of the proof")
                break
            for contender in self._proof_order(contenders, round_):
                if (round_, str(contender.config)) not in done:
                    self._prove_once(contender, round_)

    def _prove_once(self, contender: TrialRecord, round_: int) -> None:
        config = self._config(contender.config)
        changes = changed_knobs(self._prepared.base.to_dict(), contender.config)
        source = f"proof of trial {contender.number}"
        told = {name: pair[1] for name, pair in changes.items()}
        self._listener.trial_started(self._trials.next_number, source, told)
        window = proof_window(self._prepared.num_windows, round_)
        foretold = self._foretold(config, window)
        record = self._trials.run("proof", source, config, window, round_, predicted=foretold)
        self._proof.append(record)
        self._listener.trial_ended(record, self._exploration.best())

    def _note(self, text: str) -> None:
        if text not in self._prepared.notes:
            self._prepared.notes.append(text)
            self._listener.note(text)


def proof_window(num_windows: int, round_: int) -> int:
    """The window of a round of the proof: one of its own, as far as the traffic goes."""
    return 1 + round_ % (num_windows - 1) if num_windows > 1 else 0
