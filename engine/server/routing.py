"""Who of several engines gets the next request: one policy, of the server and of simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

Router = Literal["round_robin", "least_loaded", "prefix_aware"]
ROUTERS: tuple[Router, ...] = get_args(Router)

# An engine is worth its cache while it has at most this many requests, and this share of them, more
# than the least loaded one. Without such a limit everyone who shares a prompt queues at one engine.
SPARE_REQUESTS = 4
SPARE_SHARE = 0.5


class Routing:
    """Chooses among engines, request by request in the order of arrival.

    `round_robin` deals requests out in turn. `least_loaded` gives each to the engine with the
    fewest unfinished ones. `prefix_aware` gives it to the engine that has most of its prompt in the
    cache, unless that has too much to do: more than `SPARE_REQUESTS` and `SPARE_SHARE` above the
    least loaded one. Equals are served in turn: the engine that was chosen longest ago comes first.

    Args:
        router: by what rule.
        engines: how many engines there are.
    """

    def __init__(self, router: Router, engines: int) -> None:
        self.router = router
        self._chosen = list(range(-engines, 0))  # when each was chosen last
        self._count = 0

    def choose(
        self,
        unfinished: Callable[[], Sequence[int]],
        cached: Callable[[int], int] | None = None,
        among: Sequence[int] | None = None,
    ) -> int:
        """The number of the engine that the next request goes to.

        Args:
            unfinished: tells how many requests each engine has; asked if the rule needs it.
            cached: tells how much of the prompt an engine has in its cache, in any unit; None if
                that is not known of any.
            among: the engines that can be chosen, at least one; by default all.
        """
        chosen = self._choose(unfinished, cached, among)
        self._chosen[chosen] = self._count
        self._count += 1
        return chosen

    def _choose(
        self,
        unfinished: Callable[[], Sequence[int]],
        cached: Callable[[int], int] | None,
        among: Sequence[int] | None,
    ) -> int:
        places = range(len(self._chosen)) if among is None else among
        if len(places) == 1:
            return places[0]
        if self.router == "round_robin":
            return min(places, key=self._chosen.__getitem__)
        busy = unfinished()
        if self.router == "prefix_aware" and cached is not None:
            places = _with_most_cached(places, busy, cached)
        return min(places, key=lambda place: (busy[place], self._chosen[place]))


def _with_most_cached(
    places: Sequence[int], busy: Sequence[int], cached: Callable[[int], int]
) -> Sequence[int]:
    """Those that have most of a prompt, of those that have not too much to do."""
    least = min(busy[place] for place in places)
    limit = least + max(SPARE_REQUESTS, int(SPARE_SHARE * least))
    known = {place: cached(place) for place in places if busy[place] <= limit}
    most = max(known.values())
    return [place for place, amount in known.items() if amount == most]
