"""One engine of a fleet: it also tells for how long what a router asks of it stays the same."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from autotune.predict.virtual_engine import VirtualEngine
from autotune.workload.materialise import LoadRequest
from engine.block_tables import BlockTables


class Replica(VirtualEngine):
    """A `VirtualEngine` that need not be run until something can change in it.

    A router asks each engine at each arrival. Were all of them run up to each, their runs of steps
    would be cut to pieces by the whole fleet's arrivals; so an engine is left alone until a request
    may have finished.
    """

    _settled_until = -math.inf

    def settle(self, at: float) -> None:
        """Run up to a moment, unless `outstanding` is known not to change before it."""
        if at < self._settled_until:
            return
        self.run(at)
        self._settled_until = max(at, self._next_departure(at))

    def send(self, load: LoadRequest, due: float, *, received_tokens: int = 0) -> None:
        """Take in a request; see `VirtualEngine.send`."""
        self.run(due)
        super().send(load, due, received_tokens=received_tokens)
        self._settled_until = -math.inf

    def known_prefix(self, tables: BlockTables, token_ids: Sequence[int]) -> int:
        """Tokens of a prompt that are in the cache; `tables` keep its names from one to the next.

        The cache is as it was when something last changed who runs.
        """
        pool = self.scheduler.pool
        return pool.match_prefix(tables, token_ids).num_blocks * pool.block_size

    def _next_departure(self, at: float) -> float:
        """Before when nobody leaves, if nobody comes."""
        departures = self.departures
        place = bisect_right(departures, at)
        if place < len(departures):
            return departures[place]
        if not self.has_unfinished:
            return math.inf
        steps = self._steady_steps()
        # One step, or one that is yet to be chosen, is under way: nobody leaves by its beginning.
        ends = self._steady_ends(steps, math.inf) if steps > 1 else None
        return (
            self.now if ends is None else ends[-1] - self._times.gap_of(len(self.scheduler.running))
        )
