"""Who gets the next request."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.simulation.fleet import Router
from autotune.simulation.replica import Replica
from autotune.workload.materialise import LoadRequest
from engine.block_tables import BlockTables

# An engine is worth its cache while it has at most this many requests, and this share of them, more
# than the least loaded one. Without such a limit everyone who shares a prompt queues at one engine.
SPARE_REQUESTS = 4
SPARE_SHARE = 0.5


class Routing:
    """Chooses among engines, request by request in the order of arrival.

    Equals are served in turn: the engine that was chosen longest ago comes first.

    Args:
        router: by what rule.
        replicas: the engines.
        prompts: whether requests bring prompts that may be in a cache.
    """

    def __init__(
        self, router: Router, replicas: Sequence[Replica], *, prompts: bool = True
    ) -> None:
        self._router = router
        self._replicas = replicas
        self._prompts = prompts
        self._chosen = list(range(-len(replicas), 0))  # when each was chosen last
        self._count = 0

    def choose(self, load: LoadRequest, due: float) -> int:
        """The number of the engine that a request goes to; it has then been run up to `due`."""
        chosen = self._choose(load, due)
        self._chosen[chosen] = self._count
        self._count += 1
        return chosen

    def _choose(self, load: LoadRequest, due: float) -> int:
        replicas = self._replicas
        if len(replicas) == 1:
            return 0
        if self._router == "round_robin":
            return self._count % len(replicas)
        unfinished = []
        for replica in replicas:
            replica.settle(due)
            unfinished.append(replica.outstanding(due))
        places: Sequence[int] = range(len(replicas))
        if self._router == "prefix_aware" and self._prompts:
            places = self._with_most_cached(load, unfinished)
        return min(places, key=lambda place: (unfinished[place], self._chosen[place]))

    def _with_most_cached(self, load: LoadRequest, unfinished: Sequence[int]) -> Sequence[int]:
        """Those that have most of a prompt, of those that have not too much to do."""
        least = min(unfinished)
        limit = least + max(SPARE_REQUESTS, int(SPARE_SHARE * least))
        tables = BlockTables.empty(1)  # names the prompt's blocks, which are the same for all
        cached = [
            replica.known_prefix(tables, load.token_ids) if busy <= limit else -1
            for replica, busy in zip(self._replicas, unfinished, strict=True)
        ]
        most = max(cached)
        return [place for place, tokens in enumerate(cached) if tokens == most]
