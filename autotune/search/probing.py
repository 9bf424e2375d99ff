"""The machine's limits and the times of a step's parts, measured once in a run and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from autotune.profiling.schema import Ceilings, Probes
from autotune.records import RunFolder, TrialRecord
from autotune.search.evaluator import TrialEvaluator
from autotune.search.messages import Failed, ProbeCommand
from autotune.search.prepare import Prepared
from autotune.search.spending import Spending

if TYPE_CHECKING:
    from autotune.profiling.machine import MachineCalibration

# Most of a budget that probes and what is concluded from them may take, for advice; forecasts take
# as much again. With less than so many seconds, probes are too short to tell methods apart.
SHARE = 0.1
MAX_CONCLUSIONS_S = 30.0
MIN_SHARE_S = 4.0
# Of that, the part of the probes; with a long budget, or none, more is of no use.
PROBES_SHARE = 0.5
MAX_PROBES_S = 20.0


class Probing:
    """Times the machine, in the process that holds the model, when it is first asked to.

    Args:
        prepared: what the run works with.
        folder: where the result is kept, as `machine.json`.
        evaluator: holds the model.
        note: keeps a note for the result and tells it.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        evaluator: TrialEvaluator,
        note: Callable[[str], None],
    ) -> None:
        self._prepared = prepared
        self._folder = folder
        self._evaluator = evaluator
        self._note = note
        self._asked = False
        self._machine: MachineCalibration | None = None

    def machine(self, share: float) -> MachineCalibration | None:
        """What was measured, in a part of `share` seconds if it was not yet; None if it failed.

        Raises:
            Interrupted: the search was stopped.
        """
        if not self._asked:
            self._machine = self._read() or self._probe(min(MAX_PROBES_S, share * PROBES_SHARE))
            self._asked = True
        return self._machine

    def _read(self) -> MachineCalibration | None:
        """What an earlier process of this run measured."""
        from autotune.profiling.machine import MachineCalibration

        try:
            known = json.loads(self._folder.machine_json.read_text(encoding="utf-8"))
            return MachineCalibration(
                Ceilings.model_validate(known["ceilings"]), Probes.model_validate(known["probes"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _probe(self, budget_s: float) -> MachineCalibration | None:
        from autotune.profiling.machine import MachineCalibration

        offer, base = self._prepared.offer.values, self._prepared.base
        command = ProbeCommand(
            base.to_dict(),
            list(dict.fromkeys((base.quantization, *offer["quantization"]))),
            list(dict.fromkeys((base.kv_cache_dtype, *offer["kv_cache_dtype"]))),
            budget_s,
        )
        reply = self._evaluator.probe(command)
        if isinstance(reply, Failed):
            self._note(
                "the machine's limits were not measured, so predictions are rough: " + reply.reason
            )
            return None
        self._folder.write_json(
            self._folder.machine_json, {"ceilings": reply.ceilings, "probes": reply.probes}
        )
        return MachineCalibration(
            Ceilings.model_validate(reply.ceilings), Probes.model_validate(reply.probes)
        )


def why_no_probes(spending: Spending, default: TrialRecord, share: float) -> str | None:
    """Why nothing is probed to conclude from it for `share` seconds; None if it is."""
    if default.metrics is None:
        return "the default could not be measured"
    if share < MIN_SHARE_S:
        return (
            f"a tenth of the budget is {share:.1f} s, and probes need {MIN_SHARE_S:.0f} s; "
            f"--budget {MIN_SHARE_S / SHARE:.0f}s is enough"
        )
    if spending.search_left() < share + spending.trial_s():
        return "the budget leaves no time for a trial that would follow it"
    return None


def share_s(prepared: Prepared) -> float:
    """Seconds of a run that probes and what is concluded from them may take."""
    most = MAX_PROBES_S + MAX_CONCLUSIONS_S
    budget = prepared.schedule.budget_s
    return most if budget is None else min(most, SHARE * budget)
