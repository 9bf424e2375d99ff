"""Seconds measured at some sizes, interpolated between them and corrected by later ones."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

# Weights of a new observation: for all steps of so many sequences, so that what else the machine
# does for a while is not blamed on those that it meets; and for such with as many drafted tokens,
# of the first one and at least. And the largest error that one is believed, as a factor.
_SHARED_RATE, _FIRST_RATE, _RATE = 0.2, 0.5, 0.05
_MOST = math.log(4.0)
# Steps after which the error of those that are not run any more fades to 1/e.
_MEMORY = 500.0
# How far off what was measured at load may be, of steps with drafts beside those without: by two
# standard errors, as of a small model that was loaded twelve times on two Zen 3 cores.
_UNTRIED = 0.1
# Drafting is priced by sums, since a first draft for a request may take far longer than others;
# the weight of what was drafted before after each further one.
_KEPT = 0.98


class _Row(NamedTuple):
    sizes: list[float]
    seconds: list[float]


class CostGrid:
    """Seconds by the number of sequences and a size for each of them, rising with both.

    Between measured points they are interpolated linearly, along the size first; beyond the last
    one they go on as they rose last.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._counts: list[int] = []

    def add(self, num_sequences: int, size: float, seconds: float) -> None:
        """A measured point; sizes of a row come in rising order."""
        row = self._rows.setdefault(num_sequences, _Row([], []))
        # Whatever else the machine does makes a step longer, never shorter: so less takes no more.
        row.seconds[:] = [min(before, seconds) for before in row.seconds]
        row.sizes.append(size)
        row.seconds.append(seconds)
        self._counts = sorted(self._rows)

    def __len__(self) -> int:
        return sum(len(row.sizes) for row in self._rows.values())

    def seconds(self, num_sequences: int, size: float) -> float:
        """What so much takes; there must be a point.

        With rows for one number of sequences alone, more of them are as so much larger a size.
        """
        counts = self._counts
        at = bisect_left(counts, num_sequences)
        if at < len(counts) and counts[at] == num_sequences:
            return self._along(num_sequences, size)
        if len(counts) == 1:
            # A sequence is as good as a token more.
            count = counts[0]
            return self._along(count, (num_sequences * (1.0 + size)) / count - 1.0)
        high = counts[min(max(at, 1), len(counts) - 1)]
        low = counts[min(max(at, 1), len(counts) - 1) - 1]
        first, second = self._along(low, size), self._along(high, size)
        slope = max(0.0, second - first) / (high - low)
        return max(1e-9, first + slope * (num_sequences - low))

    def _along(self, num_sequences: int, size: float) -> float:
        sizes, seconds = self._rows[num_sequences]
        if len(sizes) == 1:
            return seconds[0]
        at = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        slope = (seconds[at] - seconds[at - 1]) / (high - low)
        return max(1e-9, seconds[at - 1] + slope * (size - low))


class _Error(NamedTuple):
    """The logarithm of a factor, from how many observations, and the last one's number."""

    value: float = 0.0
    observed: int = 0
    seen: int = 0


class VerifyCorrections:
    """What steps really took beside what was expected, by their sequences and drafted tokens.

    A step's error is for the most part that of its number of sequences, as contexts may be longer
    than they were when measured, and for the rest that of its drafted tokens. The latter fades when
    no such step is run, as such that seem too dear would never be run again. What steps take longer
    without drafts they take longer with them, by as many seconds, until it is seen: longer contexts
    cost a sequence's drafted tokens little.

    `plain_share` is what the step would take without its drafted tokens, as a share of its seconds,
    both as expected.
    """

    def __init__(self) -> None:
        self._shared: dict[int, float] = {}
        self._cells: dict[tuple[int, int], _Error] = {}  # by `_cell`
        self._observed = 0
        self._noise: dict[int, float] = {}
        self._tried: dict[int, int] = {}  # steps with drafts

    def hope(self, num_sequences: int) -> float:
        """The share by which steps with drafts may well take less than is expected.

        Such that seem too dear are never run, and nothing tells that they are not. So it falls with
        each one that is, as what they take is known then.
        """
        return _UNTRIED / (1 + self._tried.get(num_sequences.bit_length(), 0))

    def uncertainty(self, num_sequences: int) -> float:
        """The standard error of what two steps' factors differ by, from how far steps lie apart.

        That of two means with weights that fall by `_RATE`, of errors whose mean size is known.
        """
        mean_size = self._noise.get(num_sequences.bit_length(), 0.0)
        return mean_size * math.sqrt(math.pi / 2.0) * math.sqrt(2.0 * _RATE / (2.0 - _RATE))

    def factor(self, num_sequences: int, num_drafted: int, plain_share: float = 1.0) -> float:
        """By what the expected seconds are to be multiplied."""
        cell = _cell(num_sequences, num_drafted)
        shared = _of_all(self._shared.get(cell[0], 0.0), plain_share)
        return math.exp(shared + self._own(cell))

    def learn(
        self, num_sequences: int, num_drafted: int, ratio: float, plain_share: float = 1.0
    ) -> None:
        """A step took `ratio` times the expected seconds, uncorrected."""
        self._observed += 1
        cell = _cell(num_sequences, num_drafted)
        key, error = cell[0], math.log(max(ratio, 1e-9))
        if num_drafted:
            self._tried[key] = self._tried.get(key, 0) + 1
        if key not in self._shared:  # what the machine is like
            self._shared[key] = error
            return
        shared, own = self._shared[key], self._own(cell)
        error -= _of_all(shared, plain_share) + own
        count = self._cells[cell].observed if cell in self._cells else 0
        error = min(max(error, -_MOST), _MOST)
        noise = self._noise.get(key, 0.0)
        self._noise[key] = noise + _RATE * (abs(error) - noise)
        self._shared[key] = shared + _SHARED_RATE * error
        own += max(_RATE, _FIRST_RATE / (1 + count)) * error
        self._cells[cell] = _Error(own, count + 1, self._observed)

    def _own(self, cell: tuple[int, int]) -> float:
        error = self._cells.get(cell)
        if error is None:
            return 0.0
        return error.value * math.exp((error.seen - self._observed) / _MEMORY)


class DraftCorrections:
    """What drafting took in all beside what was expected, by the number of sequences."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}

    def factor(self, num_sequences: int) -> float:
        """By what the expected seconds are to be multiplied."""
        taken, expected = self._sums.get(num_sequences.bit_length(), (0.0, 0.0))
        return taken / expected if expected > 0.0 else 1.0

    def learn(self, num_sequences: int, expected: float, seconds: float) -> None:
        """Drafting took `seconds` where `expected` were, uncorrected."""
        key = num_sequences.bit_length()
        # To begin with, what was measured counts as much as some drafts.
        before = self._sums.get(key, (16 * expected, 16 * expected))
        self._sums[key] = before[0] * _KEPT + seconds, before[1] * _KEPT + expected


def _of_all(shared: float, plain_share: float) -> float:
    """What an error of steps without drafts, as a logarithm, comes to where these are a share."""
    return shared if shared <= 0.0 else math.log1p(math.expm1(shared) * plain_share)


def _cell(num_sequences: int, num_drafted: int) -> tuple[int, int]:
    """Sequences by powers of two; none drafted, or the rows that linear layers compute.

    Few rows one by one, as kernels take them in tiles, and more rows may take less.
    """
    if not num_drafted:
        return num_sequences.bit_length(), 0
    rows = num_sequences + num_drafted
    if rows > 32:
        rows = 32 + int(8 * math.log2(rows / 32))
    return num_sequences.bit_length(), rows
