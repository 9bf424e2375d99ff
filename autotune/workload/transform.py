"""Fitting a workload to a machine: its rate, its lengths, a slice of it.

Each transformation leaves a note, since a report on a scaled workload must say that it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from autotune.errors import BadInput
from autotune.workload.arrivals import draw_arrivals
from autotune.workload.rows import Workload, WorkloadRow


def scale_rate(
    workload: Workload,
    target_rate: float | None = None,
    *,
    factor: float | None = None,
    seed: int = 0,
    burstiness: float = 1.0,
) -> Workload:
    """Stretch or squeeze time to `target_rate` requests a second, or by `factor` on the rate.

    The pattern of the arrivals is kept. Rows that all arrive at once, as a set of prompts does,
    have no pattern: with a target rate they get random arrivals (`draw_arrivals`).

    Raises:
        BadInput: not exactly one of rate and factor, or one that is not positive and finite, or a
            factor for rows without times.
    """
    if (target_rate is None) == (factor is None):
        raise BadInput("either a rate or a factor on the rate must be given")
    wanted = factor if target_rate is None else target_rate
    assert wanted is not None
    what = "factor on the rate" if target_rate is None else "rate"
    if not 0 < wanted < math.inf:
        raise BadInput(f"the {what} is {wanted}; it must be above 0 and finite")
    rate = workload.rate
    if rate is None:
        if target_rate is None:
            raise BadInput(
                f"{workload.source} has no arrival times to scale by a factor; give a rate"
            )
        times = draw_arrivals(
            len(workload.rows), target_rate, burstiness, np.random.default_rng(seed)
        )
        kind = "Poisson" if burstiness == 1 else f"Gamma (burstiness {burstiness:g})"
        return workload.with_rows(
            (
                dataclasses.replace(row, arrival_s=float(time))
                for row, time in zip(workload.rows, times, strict=True)
            ),
            f"the rows have no times: {kind} arrivals at {target_rate:g} requests/s (seed {seed})",
        )
    ratio = wanted if target_rate is None else target_rate / rate
    return workload.with_rows(
        (dataclasses.replace(row, arrival_s=row.arrival_s / ratio) for row in workload.rows),
        f"the rate was scaled by {ratio:.4g}, from {rate:.4g} to {rate * ratio:.4g} requests/s",
    )


def scale_lengths(workload: Workload, factor: float) -> Workload:
    """Multiply the lengths of inputs and outputs; at least one token of each is left.

    Prefix blocks are scaled along, so that requests share the same part of their prompts as
    before. Recorded token ids and texts are cut off, or repeated to the new length.

    Raises:
        BadInput: the factor is not positive and finite.
    """
    if not 0 < factor < math.inf:
        raise BadInput(f"the factor on the lengths is {factor}; it must be above 0 and finite")
    if factor == 1:
        return workload
    return workload.with_rows(
        (_scaled(row, factor) for row in workload.rows),
        f"input and output lengths were multiplied by {factor:g}",
    )


def clip_lengths(workload: Workload, max_model_len: int) -> Workload:
    """Shorten the rows whose input and output together exceed `max_model_len` tokens.

    Both are shortened by the same factor, so that the balance of prefill and decode stays; each
    keeps at least one token. The beginning of the prompt is kept, and with it the prefix.

    Raises:
        BadInput: fewer than 2 tokens, the room for one of each.
    """
    if max_model_len < 2:
        raise BadInput(f"max_model_len is {max_model_len}; a request needs at least 2 tokens")
    clipped = sum(row.input_tokens + row.output_tokens > max_model_len for row in workload.rows)
    if not clipped:
        return workload
    return workload.with_rows(
        (_clipped(row, max_model_len) for row in workload.rows),
        f"{clipped} of {len(workload.rows)} requests were shortened to {max_model_len} tokens, "
        "input and output in proportion",
    )


def slice_workload(
    workload: Workload,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_requests: int | None = None,
) -> Workload:
    """The requests that arrive from `start_s` on, for `duration_s` seconds, at most so many.

    Times count from the first one kept.

    Raises:
        BadInput: a bad value, or nothing is left.
    """
    if not (0 <= start_s < math.inf):
        raise BadInput(f"the slice starts at {start_s} s; it must be 0 or later")
    if duration_s is not None and not duration_s > 0:
        raise BadInput(f"the slice lasts {duration_s} s; it must be above 0")
    if max_requests is not None and max_requests < 1:
        raise BadInput(f"the slice has {max_requests} requests; it must have at least 1")
    end = math.inf if duration_s is None else start_s + duration_s
    kept = [row for row in workload.rows if start_s <= row.arrival_s < end][:max_requests]
    if not kept:
        raise BadInput(
            f"no request of {workload.source} arrives from {start_s:g} s on within the slice; the "
            f"workload lasts {workload.duration_s:.4g} s"
        )
    if len(kept) == len(workload.rows):
        return workload
    first = kept[0].arrival_s
    return workload.with_rows(
        (dataclasses.replace(row, arrival_s=row.arrival_s - first) for row in kept),
        f"{len(kept)} of {len(workload.rows)} requests were taken, from {first:.4g} s to "
        f"{kept[-1].arrival_s:.4g} s",
    )


def repeat_workload(workload: Workload, duration_s: float) -> Workload:
    """Play a workload again and again until it lasts at least `duration_s` seconds.

    Repeated prompts would hit the prefix cache as the real traffic does not, so each repetition
    has prefixes of its own; recorded prompts cannot be changed and the note says so.

    Raises:
        BadInput: the rows have no times to go on from.
    """
    rate = workload.rate
    if rate is None:
        raise BadInput(f"{workload.source} has no arrival times; give a rate first")
    period = workload.duration_s + 1 / rate
    times = max(1, math.ceil(duration_s / period))
    if times == 1:
        return workload
    recorded = any(row.prompt or row.token_ids for row in workload.rows)
    hits = "; its recorded prompts repeat, and will hit the prefix cache" if recorded else ""
    return workload.with_rows(
        _repeated(workload.rows, times, period),
        f"the workload was played {times} times in a row{hits}",
    )


def _repeated(rows: tuple[WorkloadRow, ...], times: int, period: float) -> Iterable[WorkloadRow]:
    most = max((abs(i) for row in rows for i in row.prefix_ids or ()), default=0)
    for turn in range(times):
        shift = turn * 2 * (most + 1)
        for row in rows:
            ids = row.prefix_ids
            session = row.session_id
            yield dataclasses.replace(
                row,
                arrival_s=row.arrival_s + turn * period,
                prefix_ids=tuple(i + shift for i in ids) if ids else ids,
                session_id=f"{session}.{turn}" if session is not None and turn else session,
            )


def _scaled(row: WorkloadRow, factor: float) -> WorkloadRow:
    return _with_input(
        dataclasses.replace(row, output_tokens=_times(row.output_tokens, factor)),
        _times(row.input_tokens, factor),
        factor,
    )


def _with_input(row: WorkloadRow, input_tokens: int, block_factor: float) -> WorkloadRow:
    """The row with another input length; prefix blocks scaled by `block_factor`."""
    block = row.prefix_block_tokens
    return dataclasses.replace(
        row,
        input_tokens=input_tokens,
        prompt=_stretched(row.prompt, input_tokens / row.input_tokens),
        token_ids=_cycled(row.token_ids, input_tokens),
        prefix_block_tokens=None if block is None else _times(block, block_factor),
    )


def _clipped(row: WorkloadRow, limit: int) -> WorkloadRow:
    total = row.input_tokens + row.output_tokens
    if total <= limit:
        return row
    output = min(max(1, row.output_tokens * limit // total), limit - 1)
    return _with_input(dataclasses.replace(row, output_tokens=output), limit - output, 1.0)


def _times(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _cycled(ids: tuple[int, ...] | None, length: int) -> tuple[int, ...] | None:
    return None if ids is None else (ids * -(-length // len(ids)))[:length]


def _stretched(text: str | None, factor: float) -> str | None:
    if text is None:
        return None
    length = max(1, round(len(text) * factor))
    return (text * -(-length // len(text)))[:length]
