"""What models drafted along answers, from the chunks in which these came.

Whether a draft's greedy token is right depends on the text before it alone. Where every decode is
drafted for to the same depth, a chunk tells it: all of its tokens but the last were right, and the
last one, which is the model's own, was not, unless the draft was right to its end.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import groupby

from autotune.predict.drafting import Trace
from autotune.records import RequestRecord


def chunk_traces(records: Iterable[RequestRecord], drafted: int) -> dict[str, Trace]:
    """Traces by request id of a load in which each decode had up to `drafted` drafted tokens.

    What nobody drafted is taken to be right as often as what somebody did.
    """
    outcomes = {r.request_id: _outcomes(r.token_times, drafted) for r in records if r.completed}
    told = [right for each in outcomes.values() for right in each if right is not None]
    share = sum(told) / len(told) if told else 0.0
    found = {}
    for name, each in outcomes.items():
        draw = random.Random(name).random
        found[name] = _trace([draw() < share if right is None else right for right in each])
    return found


def tree_traces(records: Iterable[RequestRecord]) -> dict[str, Trace]:
    """Traces by request id of a load in which each decode had a tree: how deep it was right.

    Heads that look several tokens ahead go wrong where one that looks at the next does not. So
    within a chunk, where other trees may begin, a text is taken to be as easy as at its beginning.
    """
    found = {}
    for record in records:
        if record.completed:
            sizes = [sum(1 for _ in chunk) for _, chunk in groupby(record.token_times)]
            depths = [0] * sizes[0] + [size - 1 for size in sizes[1:] for _ in range(size)]
            found[record.request_id] = Trace(tuple(depths))
    return found


def _outcomes(token_times: Sequence[float], drafted: int) -> list[bool | None]:
    """Of each token whether its draft was right; None where there was none."""
    found: list[bool | None] = []
    for _, chunk in groupby(token_times):
        size, left = sum(1 for _ in chunk), len(token_times) - len(found)
        if not found:  # what a prompt yields is drafted by nobody
            found += [None] * size
            continue
        # A step yields one token beyond what it accepts: a draft ends one before the end.
        was_whole = size - 1 >= min(drafted, left - 1)
        found += [True] * (size - 1) + [None if was_whole else False]
    return found


def _trace(outcomes: Sequence[bool]) -> Trace:
    right: list[int] = []
    run = 0
    for outcome in reversed(outcomes):
        run = run + 1 if outcome else 0
        right.append(run)
    return Trace(tuple(reversed(right)))
