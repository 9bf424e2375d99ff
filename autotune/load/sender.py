"""The sending half of an open loop: every request at its time, whatever became of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from autotune.workload.rows import mean_rate

# Sends later than this, or than these shares, make another load than the one that was asked for.
LAG_FLOOR_S = 0.025
LAG_SHARE_OF_TTFT = 0.1
LAG_SHARE_OF_GAP = 0.05
LAG_SHARE_OF_STEP = 0.5
LAG_PERCENTILE = 99


def in_order(requests: Sequence[LoadRequest]) -> list[LoadRequest]:
    """The requests of a load by the time of their arrival.

    Raises:
        ValueError: two requests have one id.
    """
    if len({request.request_id for request in requests}) < len(requests):
        raise ValueError("request ids of a load must differ")
    return sorted(requests, key=lambda request: request.arrival_s)


class Sender(threading.Thread):
    """Hands requests over at their times; `sends[i]` is when request i was, on the clock.

    `add` is called with each request and the time it was meant for, on the clock; it must not
    block. `wake` is set after each, so that an idle engine starts at once, and at the end.
    `cancel` ends the sending. An exception of `add` ends it too and stands in `error`.
    """

    def __init__(
        self,
        requests: Sequence[LoadRequest],
        add: Callable[[LoadRequest, float], None],
        start_at: float,
        clock: Callable[[], float],
        wake: threading.Event,
        time_limit: float | None,
    ) -> None:
        super().__init__(name="load-sender", daemon=True)
        self.requests = requests
        self.sends: list[float] = []
        self.error: Exception | None = None
        self.finished = False
        self._add = add
        self._start_at = start_at
        self._clock = clock
        self._wake = wake
        self._time_limit = time_limit
        self._cancelled = threading.Event()

    def run(self) -> None:
        """Send until the last request, the time limit, or `cancel`."""
        try:
            for request in self.requests:
                limit = self._time_limit
                if limit is not None and request.arrival_s > limit:
                    break
                due = self._start_at + request.arrival_s
                if not self._wait_until(due):
                    break
                # The time is taken before the hand-over: no token can come before its send.
                self.sends.append(self._clock())
                self._add(request, due)
                self._wake.set()
        except Exception as error:  # told to the stepping thread, which raises it
            self.error = error
        finally:
            self.finished = True
            self._wake.set()

    def cancel(self) -> None:
        """Send nothing more, and wait for the thread to end."""
        self._cancelled.set()
        self.join()

    def _wait_until(self, due: float) -> bool:
        """Sleep until `due`; False if cancelled meanwhile."""
        while (left := due - self._clock()) > 0:
            if self._cancelled.wait(left):
                return False
        return not self._cancelled.is_set()


def judge_delivery(
    intended: Sequence[float],
    sends: Sequence[float],
    slo: Slo | None,
    step_s: float = 0.0,
    *,
    interrupted: bool = False,
) -> tuple[bool, str | None]:
    """Whether the load was sent as asked, and if not, what was missing or how late it was.

    It was if no request was left out, be it that the load was `interrupted` or that its time limit
    was reached, and the 99th percentile of send - intended is at most the largest of

    - 25 ms, what a busy machine's scheduler takes to wake a thread;
    - a tenth of the tightest TTFT limit, so that lateness decides no verdict;
    - a twentieth of the mean gap between arrivals, so that the pattern of the load is kept;
    - half of `step_s`, the median step: a request waits for the end of a running step anyway.

    Times in seconds. Lateness is never hidden, since TTFT counts from the intended send.
    """
    notes = []
    if unsent := len(intended) - len(sends):
        why = "the load was interrupted" if interrupted else "the time limit was reached"
        notes.append(f"{unsent} of {len(intended)} requests were not sent: {why}")
    if sends and (late := _lateness(intended, sends, slo, step_s)) is not None:
        notes.append(late)
    return not notes, "; ".join(notes) or None


def _lateness(
    intended: Sequence[float], sends: Sequence[float], slo: Slo | None, step_s: float
) -> str | None:
    """That the sends were later than is allowed; None if they were not."""
    lags = np.maximum(np.asarray(sends) - np.asarray(intended[: len(sends)]), 0.0)
    late = float(np.percentile(lags, LAG_PERCENTILE))
    bounds = [limit.bound for limit in slo.limits if limit.metric == "ttft"] if slo else []
    rate = mean_rate(list(intended))
    allowed = max(
        LAG_FLOOR_S,
        LAG_SHARE_OF_TTFT * min(bounds, default=0.0),
        LAG_SHARE_OF_GAP / rate if rate else 0.0,
        LAG_SHARE_OF_STEP * step_s,
    )
    if late <= allowed:
        return None
    return (
        f"the load was not delivered as asked: 1% of the requests were sent {late * 1e3:.0f} ms "
        f"late or more ({lags.max() * 1e3:.0f} ms at worst), {allowed * 1e3:.0f} ms are allowed; "
        "the machine is too busy to send at this rate"
    )
