"""Which kernel and which tiles a problem is solved with: what was measured here, or a default.

A launcher asks ``choice_for`` at every call. A kernel's module announces the choices that may be
measured; who measures (``measure``) runs the operation as everybody does, inside ``forced``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from kernels.triton.runtime import INTERPRETED, DeviceFacts


class Problem(NamedTuple):
    """What the best choice depends on. A tuple, because it is a key of every launch.

    `kernel` names the operation ("int4_linear"), `sizes` are the numbers that matter to it (rows
    as ``round_rows`` gives them, N, K, group size ...) and `dtypes` the types of its operands.
    """

    kernel: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to solve a problem: `path` is "triton" or another's name ("scaled_mm", "widen").

    `tiles` are the launch's compile-time numbers ("block_m", "num_warps" ...), none elsewhere.
    """

    path: str
    tiles: Mapping[str, int] = field(default_factory=dict)


Default = Choice | Callable[[Problem, DeviceFacts], Choice]
Choices = Callable[[Problem, DeviceFacts], Sequence[Choice]]


class TuningTable:
    """Measured choices of one device."""

    def __init__(self, choices: Mapping[Problem, Choice] | None = None) -> None:
        self._choices: dict[Problem, Choice] = dict(choices or {})

    def get(self, problem: Problem) -> Choice | None:
        """What was measured to be best, None if nothing was."""
        return self._choices.get(problem)

    def put(self, problem: Problem, choice: Choice) -> None:
        """Note what was measured to be best."""
        self._choices[problem] = choice

    def items(self) -> list[tuple[Problem, Choice]]:
        """Everything that was measured."""
        return list(self._choices.items())


class _State:
    def __init__(self) -> None:
        self.announced: dict[str, Choices] = {}
        self.tables: dict[DeviceFacts, TuningTable] = {}
        # What was decided, so that a launch costs one look-up.
        self.decided: dict[tuple[DeviceFacts, Problem], Choice] = {}
        self.asked: dict[Problem, Choice] | None = None
        self.forced: dict[Problem, Choice] = {}


_state = _State()


def round_rows(rows: int) -> int:
    """The least power of two that is not below a number of rows; problems name rows by it."""
    return 1 << (rows - 1).bit_length() if rows > 1 else 1


def announce(kernel: str, choices: Choices) -> None:
    """Tell what may be chosen for the problems of a kernel; its module does so when imported.

    `choices(problem, facts)` lists only what can run on the device; measured choices that it does
    not list (of an older version, of a file that was tampered with) are not used.
    """
    _state.announced[kernel] = choices


def candidates(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """What may be chosen for a problem; nothing for a kernel that announces none."""
    choices = _state.announced.get(problem.kernel)
    return [] if choices is None else list(choices(problem, facts))


def choice_for(problem: Problem, default: Default, facts: DeviceFacts) -> Choice:
    """What to solve a problem with: what was measured on such a device, else the default.

    `default` is a choice, or makes one of (problem, facts) when it is needed.
    """
    choice = _state.decided.get((facts, problem))
    return _decide(problem, default, facts) if choice is None else choice


def _decide(problem: Problem, default: Default, facts: DeviceFacts) -> Choice:
    choice = _state.forced.get(problem) or measured(problem, facts)
    if choice is None:
        choice = default if isinstance(default, Choice) else default(problem, facts)
    if _state.asked is not None:
        _state.asked[problem] = choice
    else:
        _state.decided[facts, problem] = choice
    return choice


def measured(problem: Problem, facts: DeviceFacts) -> Choice | None:
    """What was measured to be best on such a device and may still be chosen, None if nothing."""
    choice = table_of(facts).get(problem)
    return choice if choice is not None and choice in candidates(problem, facts) else None


def table_of(facts: DeviceFacts) -> TuningTable:
    """The measured choices of such a device, read from disk when first asked for."""
    table = _state.tables.get(facts)
    if table is None:
        table = TuningTable()
        if facts != INTERPRETED:
            # Not at the top: the cache on disk stores this module's classes.
            from kernels.triton import tuning_cache

            table = tuning_cache.load(facts)
        _state.tables[facts] = table
    return table


def use(table: TuningTable, facts: DeviceFacts) -> None:
    """Launch by this table on such devices from now on."""
    _state.tables[facts] = table
    _state.decided.clear()


def put(problem: Problem, choice: Choice, facts: DeviceFacts) -> None:
    """Solve a problem so on such devices from now on: it was measured to be best."""
    table_of(facts).put(problem, choice)
    _state.decided.clear()


def untuned() -> list[Problem]:
    """Problems that were solved by default so far though there is something to choose from."""
    return [
        problem
        for (facts, problem), _ in list(_state.decided.items())
        if measured(problem, facts) is None and len(candidates(problem, facts)) > 1
    ]


@contextmanager
def recording() -> Iterator[dict[Problem, Choice]]:
    """The problems that are asked for inside the block, with what they are solved with."""
    _state.decided.clear()
    _state.asked = {}
    try:
        yield _state.asked
    finally:
        _state.asked = None
        _state.decided.clear()


@contextmanager
def forced(choices: Mapping[Problem, Choice]) -> Iterator[None]:
    """Solve these problems so inside the block, whatever was measured."""
    before = _state.forced
    _state.decided.clear()
    _state.forced = {**before, **choices}
    try:
        yield
    finally:
        _state.forced = before
        _state.decided.clear()
