"""Who gets the next request in a simulation: the server's policy, on virtual engines."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.simulation.replica import Replica
from autotune.workload.materialise import LoadRequest
from engine.block_tables import BlockTables
from engine.server.routing import Router, Routing


class VirtualRouting:
    """Chooses among virtual engines as `engine.server.routing` does among real ones.

    What an engine has in its cache is known here; the server's router remembers what it sent where.

    Args:
        router: by what rule.
        replicas: the engines.
        prompts: whether requests bring prompts that may be in a cache.
    """

    def __init__(
        self, router: Router, replicas: Sequence[Replica], *, prompts: bool = True
    ) -> None:
        self._routing = Routing(router, len(replicas))
        self._replicas = replicas
        self._prompts = prompts

    def choose(self, load: LoadRequest, due: float) -> int:
        """The number of the engine that a request goes to; it has then been run up to `due`."""
        tables = BlockTables.empty(1)  # names the prompt's blocks, which are the same for all

        def unfinished() -> list[int]:
            found = []
            for replica in self._replicas:
                replica.settle(due)
                found.append(replica.outstanding(due))
            return found

        def cached(place: int) -> int:
            return self._replicas[place].known_prefix(tables, load.token_ids)

        return self._routing.choose(unfinished, cached if self._prompts else None)
