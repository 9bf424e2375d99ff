"""The grammar of a service-level objective.

    slo    := limit ("," limit)*
    limit  := latency op number time      e.g. ttft<200ms, p99(tpot)<=0.1s, mean(e2e)<3s
            | share op number ["%"]       error_rate<1%, goodput>=0.99, quality_loss<1%,
                                          top1_agreement>=98%
            | "throughput" op number "tok/s"
            | "kl" op number              nats a token, against the unquantized model

Latencies are `ttft`, `tpot`, `itl` and `e2e`; without a named statistic a limit holds the 95th
percentile. `quality_loss` (relative perplexity), `kl` and `top1_agreement` limit the harm of a
quantization: `autotune.quality_guard`. Whitespace is free.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NoReturn

from autotune.errors import BadInput

Operator = Literal["<", "<=", ">", ">="]
Kind = Literal["time", "share", "rate", "number"]

LATENCIES = ("ttft", "tpot", "itl", "e2e")
DEFAULT_STATISTIC = "p95"
# A strict limit that is met with equality is violated, by this much.
_EQUALITY_VIOLATION = 1e-9

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(LATENCIES, "time"),
    "error_rate": "share",
    "goodput": "share",
    "throughput": "rate",
    "quality_loss": "share",
    "kl": "number",
    "top1_agreement": "share",
}
_AT_LEAST = ("goodput", "throughput", "top1_agreement")
# Shares that a limit holds up rather than down, and what they are shares of.
_SHARES_HELD_UP = {
    "goodput": "requests that meet every per-request limit",
    "top1_agreement": "tokens on which the model and its unquantized self agree",
}
_SECONDS = {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}
_METRICS_TEXT = ", ".join(_KINDS)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[0-9]+)?")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_PERCENTILE = re.compile(r"p([0-9]+(?:\.[0-9]+)?)")
_COMPARISON = re.compile(r"[<>]=?|[=!≤≥]=?")
_UNIT = re.compile(r"%|[A-Za-zµμ]+(?:/[A-Za-z]*)?")


class SloError(BadInput):
    """An SLO that cannot be understood.

    The message quotes the text, points at the character and says what is allowed there.
    `position` is the index of that character in `text`.
    """

    def __init__(self, text: str, position: int, problem: str, allowed: str) -> None:
        shown, column = _excerpt(text, position)
        super().__init__(
            f'the SLO "{shown}" is not understood: {problem}\n'
            f"  {shown}\n"
            f"  {' ' * column}^\n"
            f"  allowed here: {allowed}"
        )
        self.text = text
        self.position = position


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: `statistic` of `metric` compared by `operator` with `bound`.

    `bound` is in seconds for latencies, a ratio for shares, output tokens per second for
    throughput and nats for kl. `statistic` is `mean` or `pNN` for latencies and None otherwise.
    `text` is the limit as written, without whitespace.
    """

    metric: str
    statistic: str | None
    operator: Operator
    bound: float
    text: str

    @property
    def per_request(self) -> bool:
        """Whether a single request can meet or miss it; goodput counts requests that meet all."""
        return self.metric in LATENCIES

    @property
    def quantile(self) -> float | None:
        """The percentile in percent, for `pNN`; None for `mean` and where there is none."""
        if self.statistic is None or self.statistic == "mean":
            return None
        return float(self.statistic[1:])

    def met_by(self, value: float) -> bool:
        """Whether a value in the unit of `bound` meets the limit; NaN never does."""
        match self.operator:
            case "<":
                return value < self.bound
            case "<=":
                return value <= self.bound
            case ">":
                return value > self.bound
            case ">=":
                return value >= self.bound

    def violation(self, value: float) -> float:
        """value/bound - 1, signed so that <= 0 is met; with a bound of 0, the value itself."""
        if self.bound == 0:
            relative = value
        elif self.operator in (">", ">="):
            relative = 1 - value / self.bound
        else:
            relative = value / self.bound - 1
        if self.met_by(value):
            return min(relative, 0.0)
        return max(relative, _EQUALITY_VIOLATION)


def parse_limits(text: str) -> tuple[Limit, ...]:
    """Read the limits of an SLO in the order in which they are written.

    Raises:
        SloError: the text is not an SLO, or names the same statistic twice.
    """
    return tuple(_Parser(text).limits())


class _Parser:
    """Reads limits from left to right; `position` is the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def limits(self) -> Iterator[Limit]:
        seen: dict[tuple[str, str | None], str] = {}
        while True:
            self._skip_space()
            start = self.position
            limit = self._limit()
            key = (limit.metric, limit.statistic)
            if key in seen:
                what = f"{limit.statistic} of {limit.metric}" if limit.statistic else limit.metric
                self._fail(
                    f"{what} is limited twice, by {seen[key]} and by {limit.text}",
                    "one limit for each statistic of a metric",
                    start,
                )
            seen[key] = limit.text
            yield limit
            self._skip_space()
            if self.position == len(self.text):
                return
            if self.text[self.position] != ",":
                self._fail(f"{self._here()} follows a whole limit", "a comma, or the end")
            self.position += 1

    def _limit(self) -> Limit:
        at = self.position
        word = self._match(_WORD)
        if word is None:
            self._fail(f"{self._here()} where a limit begins", _METRICS_TEXT)
        statistic: str | None = None
        metric, written = word, word
        if self._peek() == "(":
            statistic = self._statistic(word, at)
            self.position += 1
            self._skip_space()
            at = self.position
            metric = self._match(_WORD) or ""
            self._known(metric, at, LATENCIES, f"{word} must be of a latency, ")
            if self._peek() != ")":
                self._fail(f"{self._here()} where ) must close {word}(", ")")
            self.position += 1
            written = f"{word}({metric})"
        else:
            self._known(metric, at, tuple(_KINDS), "")
            if metric in LATENCIES:
                statistic = DEFAULT_STATISTIC
        operator = self._operator(metric)
        number, bound, unit = self._bound(metric, operator)
        return Limit(metric, statistic, operator, bound, f"{written}{operator}{number}{unit}")

    def _statistic(self, word: str, at: int) -> str:
        allowed = "mean, or p with a number above 0 and below 100, such as p99 or p99.9"
        if word == "mean":
            return word
        found = _PERCENTILE.fullmatch(word)
        if found is None:
            self._fail(f"{word!r} is not a statistic", allowed, at)
        if not 0 < float(found[1]) < 100:
            self._fail(f"{word} is not a percentile", allowed, at)
        return "p" + format(Decimal(found[1]).normalize(), "f")

    def _known(self, word: str, at: int, allowed: Sequence[str], lead: str) -> None:
        if word in allowed:
            return
        if not word:
            self._fail(f"{lead}{self._here()} found", ", ".join(allowed), at)
        if word in _KINDS:
            self._fail(f"{lead}{word} is none", ", ".join(allowed), at)
        near = next((name for name in allowed if name == word.lower()), None)
        if _PERCENTILE.fullmatch(word) or word == "mean":
            self._fail(f"{word} names no metric", f"{word}(ttft) and the like", at)
        hint = f"; did you mean {near}?" if near else ""
        self._fail(f"{word!r} is not a metric{hint}", ", ".join(allowed), at)

    def _operator(self, metric: str) -> Operator:
        self._skip_space()
        at = self.position
        found = self._match(_COMPARISON)
        right: tuple[Operator, ...] = (">", ">=") if metric in _AT_LEAST else ("<", "<=")
        allowed = " or ".join(right)
        if found is None:
            self._fail(f"{self._here(at)} where {metric} is compared", allowed, at)
        operator = next((name for name in right if name == found), None)
        if operator is None:
            why = f"{metric} is better when it is {'higher' if metric in _AT_LEAST else 'lower'}"
            if found not in ("<", "<=", ">", ">="):
                why = f"{found!r} is not a comparison"
            self._fail(why, allowed, at)
        return operator

    def _bound(self, metric: str, operator: Operator) -> tuple[str, float, str]:
        """The number as written, the bound in SI units, and the unit as written."""
        self._skip_space()
        at = self.position
        number = self._match(_NUMBER)
        if number is None:
            what = "a negative number" if self.text[at : at + 1] == "-" else self._here(at)
            self._fail(f"{what} where the bound of {metric} belongs", "a number such as 200", at)
        self._skip_space()
        unit_at = self.position
        unit = self._match(_UNIT) or ""
        kind = _KINDS[metric]
        allowed = {"time": "us, ms or s", "rate": "tok/s", "share": "% or nothing"}
        units = {"time": tuple(_SECONDS), "rate": ("tok/s",), "share": ("%", "")}.get(kind, ("",))
        if unit not in units:
            what = (
                f"{unit!r} is not a unit of {metric}"
                if unit
                else f"the bound of {metric} has no unit"
            )
            where = allowed.get(kind, "nothing: kl is a plain number of nats")
            self._fail(what, where, unit_at)
        if not math.isfinite(float(number)):
            self._fail(f"{metric} has a bound beyond all numbers", "a smaller number", at)
        factor = Decimal("0.01") if unit == "%" else _SECONDS.get(unit, Decimal(1))
        # In decimal, so that 200ms is exactly the float 0.2. What a float takes for 0 may be
        # beyond a decimal's exponents.
        bound = float(Decimal(number) * factor) if float(number) else 0.0
        self._plausible(metric, operator, bound, at)
        return number, bound, unit

    def _plausible(self, metric: str, operator: Operator, bound: float, at: int) -> None:
        """Refuse bounds that nothing or everything meets."""
        if metric in _SHARES_HELD_UP:
            if not 0 < bound <= 1 or (bound == 1 and operator == ">"):
                self._fail(
                    f"{metric} is the share of {_SHARES_HELD_UP[metric]}",
                    "a share above 0 and below 1 (or >=1), such as 0.99 or 99%",
                    at,
                )
        elif bound == 0 and (operator != "<=" or _KINDS[metric] == "time"):
            self._fail(f"nothing can meet {metric}{operator}0", "a number above 0", at)
        elif _KINDS[metric] == "share" and bound >= 1:
            self._fail(f"{metric} is a share", "a share below 1, such as 1% or 0.01", at)

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.position)
        if found is None:
            return None
        self.position = found.end()
        return found[0]

    def _peek(self) -> str:
        self._skip_space()
        return self.text[self.position : self.position + 1]

    def _skip_space(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def _here(self, at: int | None = None) -> str:
        character = self.text[self.position if at is None else at :][:1]
        return f"{character!r}" if character else "the end"

    def _fail(self, problem: str, allowed: str, at: int | None = None) -> NoReturn:
        raise SloError(self.text, self.position if at is None else at, problem, allowed)


def _excerpt(text: str, position: int, reach: int = 60) -> tuple[str, int]:
    """The text around `position` on one line, and the column at which that character stands."""
    first, last = max(0, position - reach), position + reach
    head = "..." if first else ""
    shown = [c if c.isprintable() else " " if c.isspace() else "?" for c in text[first:last]]
    before = head + "".join(shown[: position - first])
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in before)
    narrow = sum(unicodedata.combining(c) > 0 for c in before)
    tail = "..." if last < len(text) else ""
    return head + "".join(shown) + tail, len(before) + wide - narrow
