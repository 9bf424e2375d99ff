"""How long the parts of a step take, each alone: what a prediction of other knobs is made of.

Everything is sampled in rounds, and forms that are compared take turns within each: so what else
the machine does for a while falls on all of them, and on one round of several. Each figure is the
lower quartile over rounds, in seconds of all layers: what delays a run is not the part's own, and
the fastest run may be one that found its operands by luck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.observed_rows import observe_rows
from engine.probe_operations import AttentionLayers, RandomRows, own_layers, random_layers
from kernels.triton.measure import Operation

# Rows of a step at which linear layers are timed: every power of two, and between them where steps
# of decodes lie, as kernels work in tiles of 16 or 32 rows.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
DECODES = (1, 2, 4, 16, 64)
CONTEXTS = (32, 128, 512, 2048, 8192)
# (new tokens, context) of a prompt chunk.
CHUNKS = ((16, 16), (64, 64), (256, 256), (16, 256), (512, 512), (128, 1024))
MOST_DECODE_TOKENS = 16384
ROUNDS = 7
NEEDED_ROUNDS = 3
# Twice the work takes twice the time at most, but for caches that no longer hold it.
PROPORTION = 1.5
# Passes through layers are cut to about this long: beyond, arithmetic alone takes the time, and
# few layers tell of all.
LONGEST_PASS_S = 0.02
SHORTEST_SAMPLE_S = 0.0005

Runs = Sequence[Callable[[], object]]


@dataclass(slots=True)
class LinearTimes:
    """Seconds of all linear layers but the head, and of the head, by rows."""

    method: str
    rows: list[int] = field(default_factory=list)
    layers_s: list[float] = field(default_factory=list)
    head_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class AttentionTimes:
    """Seconds of the attention of all layers.

    Point i has `sequences[i]` decodes of `contexts[i]` tokens each; chunk j computes
    `chunk_tokens[j]` tokens at the end of `chunk_contexts[j]`.
    """

    sequences: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    chunk_contexts: list[int] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)


def probe_linears(
    decoder: Decoder,
    own: str,
    methods: Iterable[str],
    most_rows: int,
    most_sampled: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[LinearTimes]:
    """Time the linear layers as they are, as method `own`, and in the forms of other methods.

    `methods` in order of importance: where preparing them takes more than half of `budget_s`, or
    there is no memory for them, the rest is left out. The head is timed up to `most_sampled` rows;
    beyond, its time goes on as it rose.
    """
    begin = clock()
    with torch.inference_mode():
        forms = [own_layers(decoder, own)]
        for method in methods:
            spent = clock() - begin
            if spent + spent / len(forms) > budget_s / 2:
                break
            try:
                forms.append(random_layers(decoder, method))
            except torch.OutOfMemoryError:  # what is loaded leaves no room beside it
                break
        observed: dict[float, Mapping[str, Tensor]] = {0.0: {}}
        for threshold in {form.outlier_threshold for form in forms} - {0.0}:
            observed[threshold] = observe_rows(decoder, threshold)
        ladder = row_ladder(most_rows)
        tasks = []
        for rows in ladder:
            inputs = RandomRows(decoder, rows)
            passes = [
                # The head comes after layers, as in a step: they have taken the cache meanwhile.
                _Pass(
                    form.runs(inputs.with_observed(observed[form.outlier_threshold])),
                    form.head_run(inputs) if rows <= most_sampled else None,
                )
                for form in forms
            ]
            tasks.append(_Task(passes, needed=rows in (ladder[0], ladder[-1])))
        _sample_in_rounds(decoder, tasks, forms[0].nbytes, begin + budget_s, clock)
    times = [LinearTimes(form.method) for form in forms]
    for count, task in zip(ladder, tasks, strict=True):
        for form, entry, timed in zip(forms, times, task.passes, strict=True):
            if timed.running:
                last = entry.head_s[-1] * count / entry.rows[-1] if entry.rows else 0.0
                entry.rows.append(count)
                entry.layers_s.append(_low(timed.running) * form.num_layers)
                entry.head_s.append(last if timed.last is None else _low(timed.ending))
    for entry in times:
        layers = zip(entry.rows, entry.layers_s, strict=True)
        heads = zip(entry.rows, entry.head_s, strict=True)
        entry.layers_s = _plausible([(r, r, r, seconds) for r, seconds in layers])
        entry.head_s = _plausible([(r, r, r, seconds) for r, seconds in heads])
    return times


def row_ladder(most_rows: int) -> list[int]:
    """The rows to time, up to those of the largest step, which is among them."""
    return [*(rows for rows in ROWS if rows < most_rows), most_rows]


def probe_attention(
    decoder: Decoder,
    cache_dtypes: Mapping[str, torch.dtype],
    block_size: int,
    longest: int,
    most_sequences: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, AttentionTimes]:
    """Time attention over caches of the dtypes, by their names; `longest` context in tokens.

    Those that there is no memory for are left out, the last first.
    """
    decodes = [
        (count, context)
        for count in DECODES
        if count <= most_sequences
        for context in _contexts(longest)
        if count * context <= MOST_DECODE_TOKENS or context == min(CONTEXTS)
    ]
    chunks = [(new, context) for new, context in CHUNKS if context <= longest]
    chunks = chunks or [(longest, longest)]
    ends = _ends(decodes)
    shapes = [*decodes, *chunks]
    with torch.inference_mode():
        end = clock() + budget_s
        most = max(count * context for count, context in shapes)
        caches: dict[str, AttentionLayers] = {}
        for name, dtype in cache_dtypes.items():
            try:
                caches[name] = AttentionLayers.make(decoder, dtype, block_size, most)
            except torch.OutOfMemoryError:  # what is loaded leaves no room beside it
                break
        if not caches:
            return {}
        layers = list(caches.values())
        tasks = []
        for place, (number, context) in enumerate(shapes):
            is_chunk = place >= len(decodes)
            lens = (number,) if is_chunk else (1,) * number
            passes = [_Pass(each.runs(decoder, lens, context)) for each in layers]
            tasks.append(_Task(passes, needed=is_chunk or (number, context) in ends))
        _sample_in_rounds(decoder, tasks, layers[0].caches[0].nbytes, end, clock)
    times = {name: AttentionTimes() for name in caches}
    for place, ((number, context), task) in enumerate(zip(shapes, tasks, strict=True)):
        for each, entry, timed in zip(layers, times.values(), task.passes, strict=True):
            if not timed.running:
                continue
            seconds = _low(timed.running) * each.num_layers
            if place >= len(decodes):
                entry.chunk_tokens.append(number)
                entry.chunk_contexts.append(context)
                entry.chunk_seconds.append(seconds)
            else:
                entry.sequences.append(number)
                entry.contexts.append(context)
                entry.seconds.append(seconds)
    for entry in times.values():
        decoded = zip(entry.sequences, entry.contexts, entry.seconds, strict=True)
        entry.seconds = _plausible([(n, c, n * c, s) for n, c, s in decoded])
        read = zip(entry.chunk_tokens, entry.chunk_contexts, entry.chunk_seconds, strict=True)
        entry.chunk_seconds = _plausible([(n, c, n * c - n * n / 2, s) for n, c, s in read])
    return times


def _ends(decodes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The fewest and the most sequences, each at their shortest and longest contexts."""
    few = [point for point in decodes if point[0] == decodes[0][0]]
    many = [point for point in decodes if point[0] == decodes[-1][0]]
    return list(dict.fromkeys([few[0], few[-1], many[0], many[-1]]))


def _contexts(longest: int) -> list[int]:
    """The contexts to time; at least two, so that a context between them can be told."""
    within = [context for context in CONTEXTS if context < longest]
    return [*within, longest] if within else sorted({max(1, longest // 4), longest})


@dataclass(slots=True)
class _Pass:
    """A run through layers, and what comes after it, with the seconds of one run of each."""

    runs: Runs
    last: Callable[[], object] | None = None
    running: list[float] = field(default_factory=list)
    ending: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Task:
    """Passes that take turns; `needed` whether or not there is time."""

    passes: list[_Pass]
    needed: bool


def _sample_in_rounds(
    decoder: Decoder,
    tasks: Sequence[_Task],
    nbytes: int,
    end: float,
    clock: Callable[[], float],
) -> None:
    """Sample all tasks again and again until `end`; needed ones `NEEDED_ROUNDS` times at least."""
    if decoder.device.type == "cuda":
        for each in (timed for task in tasks for timed in task.passes):
            each.running.append(_on_cuda(decoder.device, each.runs, nbytes))
            if each.last is not None:
                each.ending.append(_on_cuda(decoder.device, [each.last], nbytes))
        return
    ordered = sorted(tasks, key=lambda task: not task.needed)
    for number in range(ROUNDS):
        for task in ordered:
            if clock() > end and (number >= NEEDED_ROUNDS or not task.needed):
                break
            for timed in task.passes:
                if number == 0:
                    timed.runs = _cut(timed.runs)
                _run_all(timed.runs)  # those before took the cache
                _sample(timed)


def _low(seconds: list[float]) -> float:
    """The lower quartile; of four or fewer the least."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _plausible(points: Sequence[tuple[float, float, float, float]]) -> list[float]:
    """Seconds without what can only be a disturbance; points are (size, size, work, seconds).

    Nothing takes longer than what is larger in both sizes, nor much longer in proportion to the
    work than what is smaller in both.
    """
    falling = [
        (a, b, work, min(other for c, d, _, other in points if c >= a and d >= b))
        for a, b, work, _ in points
    ]
    return [
        min(
            [seconds]
            + [
                PROPORTION * t * work / w
                for c, d, w, t in falling
                if c <= a and d <= b and w < work
            ]
        )
        for a, b, work, seconds in falling
    ]


def _cut(runs: Runs) -> Runs:
    """As many layers of a pass as take about `LONGEST_PASS_S`, at least two; also warms up."""
    start = time.perf_counter()
    runs[0]()
    first = time.perf_counter()
    if len(runs) == 1:
        return runs
    runs[1]()
    once = min(first - start, time.perf_counter() - first)
    return runs[: max(2, int(LONGEST_PASS_S / max(once, 1e-9)))]


def _sample(timed: _Pass) -> None:
    """Time one run and the last, over as many passes as take long enough for the clock."""
    passes, running, ending = 0, 0.0, 0.0
    while running <= SHORTEST_SAMPLE_S:
        start = time.perf_counter()
        _run_all(timed.runs)
        middle = time.perf_counter()
        running += middle - start
        if timed.last is not None:
            timed.last()
            ending += time.perf_counter() - middle
        passes += 1
    timed.running.append(running / passes / len(timed.runs))
    timed.ending.append(ending / passes)


def _run_all(runs: Runs) -> None:
    for run in runs:
        run()


def _on_cuda(device: torch.device, runs: Runs, nbytes: int) -> float:
    # Steps of decodes are captured there: what the host takes to launch is no part of them.
    from kernels.triton.cuda_timer import CudaTimer

    timer = CudaTimer(device, seconds=0.01)
    return timer(Operation("probe", runs, nbytes))().median  # type: ignore[arg-type]
