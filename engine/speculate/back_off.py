"""Whom a look-up is worth trying for.

A look-up takes little, but it takes it for every request in every step. It is worth trying where
the share of tries that came to something, times what those saved, exceeds what a try takes.
Elsewhere it is tried after 1, 2, 4, ... steps, as long as nothing comes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.request import Request

# Steps that somebody is left alone, at most.
LONGEST = 64
# The part of the time that tries for nothing may take; nobody waits longer than that asks for.
WASTED_SHARE = 0.002
# Those that wait so long, and those that are new meanwhile, are tried together every so many steps:
# a step in which nobody is tried costs nothing.
TOGETHER = 8
_NEVER = 1 << 62
# What a look-up is to save, in times of what it takes: deciding takes time too, and promises err.
_GAIN = 3.0
# Tries after which a memory fades to 1/e: those of one request, and of all.
OWN_MEMORY = 8.0
SHARED_MEMORY = 256.0


@dataclass(slots=True)
class _Tries:
    share: float
    wait: int = 0
    due: int = 0


class BackOff:
    """Remembers what came of tries, and decides who is tried next.

    When the load has halved, everybody is tried again: what did not pay may now. So are those who
    had a draft that was not worth verifying, as soon as other drafts are, or theirs proves right.
    """

    def __init__(self) -> None:
        self._step = 0
        self._tries: dict[Request, _Tries] = {}
        self._unworthy: set[Request] = set()  # of whom the last draft was not verified
        self._pays = False  # whether of the last tries one was fruitful
        self._share = 0.5
        self._saved = 0.0
        self._load = 0
        self._soonest = 0

    def due(self, requests: Sequence[Request]) -> list[int]:
        """Begin a step that decodes these: the places of those that are to be tried."""
        self._step += 1
        step, tries = self._step, self._tries
        if 2 * len(requests) <= self._load:
            self._load = len(requests)
            self._soonest = step
            for one in tries.values():
                one.wait = one.due = 0
        if step < self._soonest and step % TOGETHER:
            return []
        due = []
        soonest = _NEVER
        for place, request in enumerate(requests):
            known = tries.get(request)
            if known is None or known.due <= step:
                due.append(place)
            elif known.due < soonest:
                soonest = known.due
        # Of those that are due now it is not known yet.
        self._soonest = step + 1 if due else soonest
        return due

    def note(
        self,
        tried: Sequence[tuple[Request, bool]],
        load: int,
        step_seconds: float,
        seconds: float,
        unworthy: Collection[Request] = (),
    ) -> None:
        """What came of the tries of a step: for each request, whether its draft is verified.

        Args:
            tried: the requests that were tried.
            unworthy: those of them that have a draft, of which nothing is verified.
            load: sequences of the step.
            step_seconds: what the step would take without drafts.
            seconds: what a try for one request takes.
        """
        self._load = max(self._load, load)
        longest = min(LONGEST, int(load * seconds / (WASTED_SHARE * step_seconds)) + 1)
        worth = _GAIN * seconds / self._saved if self._saved > 0.0 else 1.0
        known, share = self._tries, self._share
        pays = any(fruitful for _, fruitful in tried)
        if pays and not self._pays:
            for request in tuple(self._unworthy):
                self.again(request)
        if tried:
            self._pays = pays
            self._unworthy.difference_update(request for request, _ in tried)
            self._unworthy.update(unworthy)
        for request, fruitful in tried:
            one = known.get(request)
            if one is None:
                one = known[request] = _Tries(share)
            one.share += (fruitful - one.share) / OWN_MEMORY
            share += (fruitful - share) / SHARED_MEMORY
            if fruitful:
                one.wait = one.due = 0
            elif one.share < worth:
                # Of whom nothing is known, what holds for the others is likely.
                first = TOGETHER if share < worth else 1
                one.wait = min(2 * one.wait or first, longest)
                one.due = self._step + one.wait
                if one.wait >= TOGETHER:
                    one.due -= one.due % -TOGETHER
        self._share = share

    def again(self, request: Request) -> None:
        """Try the request in the next step: a draft of it that was not verified proved right."""
        one = self._tries.get(request)
        if one is not None:
            one.wait = one.due = 0
            self._soonest = self._step + 1

    def saved(self, count: int, seconds: float) -> None:
        """The drafts of `count` requests are verified, which is expected to save `seconds`."""
        if self._saved == 0.0:
            self._saved = seconds / count
        self._saved += (seconds / count - self._saved) * min(1.0, count / SHARED_MEMORY)

    def forget(self, request: Request) -> None:
        """The request left."""
        self._tries.pop(request, None)
        self._unworthy.discard(request)
