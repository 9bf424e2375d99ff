"""The order of requests: who is served first, and who gives way first.

A rank is a pair of integers; the lower is served first, the higher is preempted first. Its second
part is the order in which requests entered, so ranks never tie and schedules are deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.request import Request, RequestState

SJF_AGING_TOKENS = 16
"""Tokens by which shortest-job-first puts every later request behind an earlier one.

A request with w tokens of work is overtaken by at most w / 16 later ones, so none starves,
whatever keeps arriving. Counted in requests and not in seconds, it means the same on any machine.
"""


def rank(request: Request, policy: str, entered: int) -> tuple[int, int]:
    """The rank of the request that was the `entered`-th to enter, under `policy`.

    `priority`: the lower number first, without aging, as in vLLM. `sjf`: the fewest tokens of
    prompt and longest output first, with aging (`SJF_AGING_TOKENS`).
    """
    if policy == "priority":
        return (request.priority, entered)
    if policy == "sjf":
        return (request.max_total_tokens + SJF_AGING_TOKENS * entered, entered)
    return (entered, entered)


class WaitingQueue:
    """Requests that wait, lowest `Request.rank` first.

    A request that finishes while it waits (an abort) is dropped by `forget`, in O(1) as a rule:
    its entry stays until it comes to the front or such entries are the majority.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._forgotten = 0

    def __len__(self) -> int:
        return len(self._heap) - self._forgotten

    def __iter__(self) -> Iterator[Request]:
        """The waiting requests in no particular order."""
        return (r for _, r in self._heap if r.state is RequestState.WAITING)

    def push(self, request: Request) -> None:
        """Add a request whose state is WAITING and whose rank is set."""
        heapq.heappush(self._heap, (request.rank, request))

    def peek(self) -> Request | None:
        """The request to serve next, if any waits."""
        heap = self._heap
        while heap and heap[0][1].state is not RequestState.WAITING:
            heapq.heappop(heap)
            self._forgotten -= 1
        return heap[0][1] if heap else None

    def pop(self) -> Request:
        """Remove and return what `peek` returned."""
        return heapq.heappop(self._heap)[1]

    def forget(self) -> None:
        """Take note that one waiting request is no longer WAITING."""
        self._forgotten += 1
        if self._forgotten * 2 > len(self._heap):
            self.rebuild()

    def rebuild(self) -> None:
        """Order anew after ranks changed."""
        self._heap = [(r.rank, r) for r in self]
        heapq.heapify(self._heap)
        self._forgotten = 0
