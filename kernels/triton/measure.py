"""Which of a problem's choices is fastest on the device at hand.

A choice is measured by running the operation as everybody runs it, told which choice to take
(``tuning.forced``). Before it may win, its result is compared with the default's: a choice that is
wrong, or that cannot be compiled or launched, is never taken.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.tuning import Choice, Problem
from kernels.triton.tuning_cache import Measured

# Results may differ as sums in another order and one rounding to 16 bits do, not more.
ROW_TOLERANCE = 0.02
ELEMENT_TOLERANCE = 0.1
# Less than this is noise, and the default keeps its place.
LEAST_GAIN = 0.02
FINALISTS = 3
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Operation:
    """The same operation on one or several sets of operands, each run returning its result.

    Sets that are together far larger than the L2 cache are timed one after the other, so that each
    finds the cache as a model's layers do. `nbytes` is what one run reads and writes at least.
    """

    name: str
    runs: Sequence[Callable[[], Tensor]]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: the median and the quartiles of several."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise, of at least one."""
        ordered = sorted(seconds)
        quarter = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


class Timer(Protocol):
    """Prepares the timing of an operation as it runs now."""

    def __call__(self, operation: Operation) -> Callable[[], Timing]:
        """What measures the seconds of one run on the device, as often as it is called."""


class DeviceBroken(RuntimeError):
    """A launch left the device unusable for this process; the text says which.

    `default` is the default's measurement, which is all that is left to choose.
    """

    def __init__(self, text: str, default: Measured) -> None:
        super().__init__(text)
        self.default = default


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the measurement of a problem came to.

    `refused` says of each choice that could not win why: it failed, or its result is wrong.
    """

    problem: Problem
    measured: Measured
    times: list[tuple[Choice, Timing]]
    refused: list[tuple[Choice, str]]


def best_choice(
    problem: Problem,
    default: Choice,
    choices: Sequence[Choice],
    operation: Operation,
    timer: Timer,
) -> Outcome:
    """Measure every choice, the fastest ones again in turns with the default.

    The default wins unless another is faster by LEAST_GAIN. Raises what the default itself raises,
    and DeviceBroken where a choice leaves the device unusable.
    """
    run = operation.runs[0]
    with tuning.forced({problem: default}):
        expected = run().clone()
        measurable = [_Measurable(default, timer(operation))]
        measurable[0].measure()
    refused: list[tuple[Choice, str]] = []
    for choice in choices:
        if choice == default:
            continue
        try:
            with tuning.forced({problem: choice}):
                reason = _difference(run, expected)
                if reason is None:
                    candidate = _Measurable(choice, timer(operation))
                    candidate.measure()
                    measurable.append(candidate)
        # Triton's own errors (out of resources, compilation) have no common base but this.
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            _check_device(expected, problem, choice, measurable[0])
        if reason is not None:
            refused.append((choice, reason))
    times = [(known.choice, known.timings[0]) for known in measurable]
    return Outcome(problem, _final(problem, measurable), times, refused)


@dataclass(slots=True)
class _Measurable:
    """A choice that may win, and its timings so far."""

    choice: Choice
    again: Callable[[], Timing]
    timings: list[Timing] = field(default_factory=list)

    def measure(self) -> None:
        self.timings.append(self.again())

    @property
    def seconds(self) -> float:
        return statistics.median(timing.median for timing in self.timings)


def _final(problem: Problem, measurable: Sequence[_Measurable]) -> Measured:
    """The best of the fastest and the default, which are measured again in turns."""
    default = measurable[0]
    finalists = sorted(measurable[1:], key=lambda known: known.seconds)[:FINALISTS]
    if not finalists:
        return Measured(default.choice, default.seconds, default.seconds)
    # In turns, because clocks drift: what is compared was measured side by side.
    for _ in range(ROUNDS - 1):
        for known in (default, *finalists):
            with tuning.forced({problem: known.choice}):
                known.measure()
    best = min(finalists, key=lambda known: known.seconds)
    if best.seconds > default.seconds * (1 - LEAST_GAIN):
        best = default
    return Measured(best.choice, best.seconds, default.seconds)


def _difference(run: Callable[[], Tensor], expected: Tensor) -> str | None:
    """Why a choice's result is not the default's; None where it is. Run twice, to see a race."""
    for _ in range(2):
        _poison(expected)
        reason = difference(run(), expected)
        if reason is not None:
            return reason
    return None


def difference(out: Tensor, expected: Tensor) -> str | None:
    """Why `out` is not `expected` but for rounding, in a few words; None where it is.

    Rows (along the last dimension) may differ by ROW_TOLERANCE of their norm, and elements by
    ELEMENT_TOLERANCE of the row's root mean square: a single wrong element is seen too.
    """
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return (
            f"the result is {out.dtype} {tuple(out.shape)}, "
            f"not {expected.dtype} {tuple(expected.shape)}"
        )
    if out.numel() == 0:
        return None
    found, wanted = out.float(), expected.float()
    if not bool((found.isfinite() == wanted.isfinite()).all()):
        return "the result is not finite where the default's is"
    gap = torch.where(wanted.isfinite(), found - wanted, 0.0)
    wanted = torch.where(wanted.isfinite(), wanted, 0.0)
    width = wanted.shape[-1] ** 0.5
    norm = wanted.norm(dim=-1).clamp(min=1e-3 * float(wanted.norm(dim=-1).max()))
    by_row = float((gap.norm(dim=-1) - ROW_TOLERANCE * norm).max())
    bound = ELEMENT_TOLERANCE * norm[..., None] / width + ROW_TOLERANCE * wanted.abs()
    by_element = float((gap.abs() - bound).max())
    if by_row > 0 or by_element > 0:
        error = float(gap.norm() / wanted.norm().clamp(min=1e-30))
        return f"the result differs from the default's (relative error {error:.1e})"
    return None


def _poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next result is likely to get: what is not written shows."""
    if like.is_floating_point():
        torch.full_like(like, float("nan"))


def _check_device(x: Tensor, problem: Problem, choice: Choice, default: "_Measurable") -> None:
    """Raises DeviceBroken if the device of x no longer runs anything."""
    try:
        _synchronize(x.device)
    except RuntimeError as error:
        raise DeviceBroken(
            f"{problem.kernel} {problem.sizes} with {choice.path} {dict(choice.tiles)} left the "
            f"GPU unusable for this process: {_first_line(error)}",
            Measured(default.choice, default.seconds, default.seconds),
        ) from error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
