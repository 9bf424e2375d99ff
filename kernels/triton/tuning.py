"""Which kernel and which tiles a problem is solved with: what was measured here, or a default."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """What the best choice depends on.

    `kernel` names the operation ("int4_linear"), `sizes` are the numbers that matter to it (rows
    rounded up to a power of two, N, K, group size ...) and `dtypes` the types of its operands.
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


class TuningTable:
    """Measured choices of one device."""

    def __init__(self) -> None:
        self._choices: dict[Problem, Choice] = {}

    def get(self, problem: Problem) -> Choice | None:
        """What was measured to be best, None if nothing was."""
        return self._choices.get(problem)

    def put(self, problem: Problem, choice: Choice) -> None:
        """Note what was measured to be best."""
        self._choices[problem] = choice
