"""Measuring which kernel and which tiles a loaded model is served with best on its GPU.

Every result is saved as it is found, so a tuning that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.errors import EngineError, EnvironmentLacks, first_line
from engine.models.decoder import Decoder
from engine.tunable_operations import Sizes, Tunable, tunable_operations
from kernels.triton import runtime, tuning, tuning_cache
from kernels.triton.measure import DeviceBroken, Operation, Outcome, Timer, best_choice
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a tuning is: operations done of all, and what is measured now."""

    done: int
    total: int
    name: str


@dataclass(slots=True)
class TuningReport:
    """What a tuning came to.

    `known` problems had been measured before. `failures` are sentences on operations that could not
    be measured even with their defaults. `left` operations did not fit the budget.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    known: int = 0
    failures: list[str] = field(default_factory=list)
    left: int = 0

    @property
    def improved(self) -> list[Outcome]:
        """Problems whose default was beaten."""
        return [o for o in self.outcomes if o.measured.seconds < o.measured.default_seconds]


def check_tunable(device: torch.device) -> str:
    """The device's name.

    Raises:
        EnvironmentLacks: no Triton kernel runs there, so there is nothing to tune.
    """
    status = runtime.status(device)
    if not status.available:
        reason = "PyTorch sees no CUDA GPU" if device.type != "cuda" else status.reason
        raise EnvironmentLacks(
            f"kernels are tuned on an NVIDIA GPU of compute capability 8.0 or above, with Triton: "
            f"{reason}"
        )
    return runtime.device_facts(device.index or 0).name


def tuning_file(device: torch.device) -> Path:
    """Where the results for a device are kept."""
    return tuning_cache.path_of(runtime.device_facts(device.index or 0))


def num_tuned(device: torch.device) -> int:
    """Problems that were measured on such a device, under the versions in use."""
    return len(tuning_cache.entries(runtime.device_facts(device.index or 0)))


def default_timer(device: torch.device) -> Timer:
    """The timer of a CUDA device."""
    from kernels.triton.cuda_timer import CudaTimer

    return CudaTimer(device)


def tune_decoder(
    decoder: Decoder,
    sizes: Sizes,
    budget: float,
    timer: Timer,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> TuningReport:
    """Measure every problem that the decoder's kernels meet and that was not measured before.

    `budget` in seconds; what was begun is ended, so it may take a little longer.

    Raises:
        EngineError: a choice left the GPU unusable; it is noted, and a new process goes on.
        OSError: the results cannot be saved.
    """
    report = TuningReport()
    facts = runtime.facts_of(decoder.final_norm)
    end = clock() + budget
    tunables = tunable_operations(decoder, sizes)
    with torch.inference_mode():
        for done, tunable in enumerate(tunables):
            if clock() >= end or should_stop():
                report.left += len(tunables) - done
                break
            on_progress(Progress(done, len(tunables), tunable.name))
            _tune(tunable, facts, timer, report, lambda: clock() >= end or should_stop())
        else:
            on_progress(Progress(len(tunables), len(tunables), "done"))
    return report


def _tune(
    tunable: Tunable,
    facts: DeviceFacts,
    timer: Timer,
    report: TuningReport,
    over: Callable[[], bool],
) -> None:
    try:
        operation = tunable.make()
        asked = problems_of(operation)
    except Exception as error:
        _fail(tunable, error, report)
        return
    for problem, choice in asked.items():
        choices = tuning.candidates(problem, facts)
        if tuning.measured(problem, facts) is not None:
            report.known += 1
        elif len(choices) > 1:
            if over():
                report.left += 1
                return
            try:
                outcome = best_choice(problem, choice, choices, operation, timer)
            except DeviceBroken as error:
                # Noted as measured, so that the next process does not try it again.
                tuning_cache.store(problem, error.default, facts)
                raise EngineError(
                    f"{error}; start the command again: it goes on without this choice"
                ) from error
            except Exception as error:
                _fail(tunable, error, report)
                return
            tuning_cache.store(problem, outcome.measured, facts)
            tuning.put(problem, outcome.measured.choice, facts)
            report.outcomes.append(outcome)


def problems_of(operation: Operation) -> dict[Problem, Choice]:
    """The problems that one run of the operation asks about, and what they are solved with."""
    with tuning.recording() as asked:
        operation.runs[0]()
        return dict(asked)


def _fail(tunable: Tunable, error: Exception, report: TuningReport) -> None:
    """Note what failed. Raises EngineError where the GPU runs nothing any more."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        raise EngineError(
            f"{tunable.name} left the GPU unusable for this process: {first_line(error)}"
        ) from error
    report.failures.append(f"{tunable.name}: {first_line(error)}")


def tuning_notes(model: str, device: torch.device) -> list[str]:
    """A sentence if kernels ran by default though others could be measured, else nothing.

    `device` is the model's: what other models of this process left untuned is not its concern.
    """
    if not (runtime.runs_on(torch.empty(0, device=device)) and tuning.untuned()):
        return []
    return [
        "GPU kernels of this model run with default tiles, which were not measured on this GPU: "
        f"autotune doctor --tune-kernels --model {model} measures them once for all runs"
    ]
