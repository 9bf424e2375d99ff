"""Measured times of parts of a step, between and beyond the sizes at which they were measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# How sharply the roofline turns where reading and arithmetic take equally long: their times are
# joined as (m^p + c^p)^(1/p). An infinite power is the ideal roofline; kernels overlap the two
# imperfectly near the ridge.
ROOFLINE_POWER = 3.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by rows: straight between the measured points, and beyond the last as at its end.

    `rows` rise from 1; no rows take no time. The first point is what reading the weights takes, and
    the last tells the best arithmetic rate seen.
    """

    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    _known: dict[float, float] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, rows: Sequence[float], seconds: Sequence[float]) -> Curve:
        """A curve through points in any order.

        Raises:
            ValueError: no point, or rows that are not above 0.
        """
        points = sorted(zip(rows, seconds, strict=True))
        if not points or points[0][0] <= 0:
            raise ValueError(f"a curve needs points at rows above 0, got {list(rows)}")
        return cls(tuple(float(r) for r, _ in points), tuple(float(s) for _, s in points))

    @property
    def reading(self) -> float:
        """Seconds that memory takes: those of the fewest rows."""
        return self.seconds[0]

    @property
    def arithmetic(self) -> float:
        """Seconds of arithmetic a row, where there are so many that nothing else counts."""
        return min(s / r for r, s in zip(self.rows, self.seconds, strict=True))

    def at(self, rows: float) -> float:
        """Seconds at `rows`."""
        known = self._known.get(rows)
        if known is None:
            known = self._known[rows] = self._interpolate(rows)
        return known

    def split(self, rows: float) -> tuple[float, float]:
        """Seconds at `rows`, as those of reading and of arithmetic; they sum to `at`.

        Each part is the elasticity of the roofline with respect to it: how much of the time a small
        saving of that resource saves in proportion.
        """
        total = self.at(rows)
        read, compute = self.reading**ROOFLINE_POWER, (self.arithmetic * rows) ** ROOFLINE_POWER
        if rows <= 0 or read + compute <= 0:
            return total, 0.0
        share = read / (read + compute)
        return total * share, total * (1 - share)

    def scaled(self, rows: float, reads: float, compute: float) -> float:
        """Seconds at `rows` where reading takes `reads` and arithmetic `compute` times as long."""
        total = self.at(rows)
        if (reads == 1.0 and compute == 1.0) or rows <= 0:
            return total
        read, calculate = self.reading, self.arithmetic * rows
        before = _joined(read, calculate)
        return total * _joined(reads * read, compute * calculate) / before if before else total

    def _interpolate(self, rows: float) -> float:
        if rows <= 0:
            return 0.0
        xs, ys = self.rows, self.seconds
        if len(xs) == 1 or rows <= xs[0]:
            return ys[0]
        right = min(max(bisect_right(xs, rows), 1), len(xs) - 1)
        return _line(rows, xs[right - 1], xs[right], ys[right - 1], ys[right])


@dataclass(frozen=True, slots=True)
class Surface:
    """Seconds by sequences and by context tokens of each: straight between measured points."""

    sequences: tuple[float, ...]
    contexts: tuple[tuple[float, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    _constants: dict[float, float] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, points: Iterable[tuple[float, float, float]]) -> Surface:
        """A surface through (sequences, context, seconds) in any order.

        Raises:
            ValueError: no point.
        """
        by_sequences: dict[float, list[tuple[float, float]]] = {}
        for sequences, context, seconds in points:
            by_sequences.setdefault(float(sequences), []).append((float(context), float(seconds)))
        if not by_sequences:
            raise ValueError("a surface needs at least one point")
        # One context tells nothing of others; such counts are left out where there are better.
        told = {count: line for count, line in by_sequences.items() if len(line) > 1}
        by_sequences = told or by_sequences
        counts = sorted(by_sequences)
        lines = [sorted(by_sequences[count]) for count in counts]
        return cls(
            tuple(counts),
            tuple(tuple(context for context, _ in line) for line in lines),
            tuple(tuple(seconds for _, seconds in line) for line in lines),
        )

    def at(self, sequences: float, tokens: float) -> float:
        """Seconds of `sequences` decodes that see `tokens` tokens together."""
        if sequences <= 0:
            return 0.0
        counts, context = self.sequences, tokens / sequences
        if len(counts) == 1:
            return self._along(0, context) * sequences / counts[0]
        if sequences <= counts[0]:
            return self._along(0, context)
        right = min(bisect_right(counts, sequences), len(counts) - 1)
        left = right - 1
        low, high = self._along(left, context), self._along(right, context)
        return max(low, _line(sequences, counts[left], counts[right], low, high))

    def split(self, sequences: float, tokens: float) -> tuple[float, float]:
        """The same as seconds that do not grow with the context, and those that do.

        The former are those of no context, by the line through the two shortest ones.
        """
        total = self.at(sequences, tokens)
        constant = self._constants.get(sequences)
        if constant is None:
            constant = self._constants[sequences] = self.at(sequences, 0.0)
        constant = min(constant, total)
        return constant, total - constant

    def _along(self, index: int, context: float) -> float:
        xs, ys = self.contexts[index], self.seconds[index]
        if len(xs) == 1:
            return ys[0] * context / xs[0] if xs[0] else ys[0]
        right = min(max(bisect_right(xs, context), 1), len(xs) - 1)
        straight = _line(context, xs[right - 1], xs[right], ys[right - 1], ys[right])
        return max(straight, 0.0)


def _joined(read: float, compute: float) -> float:
    power = ROOFLINE_POWER
    joined: float = (read**power + compute**power) ** (1 / power)
    return joined


def _line(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
