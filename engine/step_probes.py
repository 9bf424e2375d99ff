"""How long the parts of a step take, each alone: what a prediction of other knobs is made of.

Forms that are compared take turns within each round, so that what else the machine does falls on
all of them. Each figure is the lower quartile over rounds, in seconds of all layers: what delays a
run is not the part's own, and the fastest run may be one that found its operands by luck.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from engine.models.decoder import Decoder
from engine.probe_operations import AttentionLayers, LinearLayers, own_layers, random_layers
from kernels.triton.measure import Operation

# Rows of a step at which linear layers are timed: every power of two, and between them where steps
# of decodes lie, as kernels work in tiles of 16 or 32 rows.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
DECODES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 128, 512, 2048, 8192)
# (new tokens, context) of a prompt chunk.
CHUNKS = ((16, 16), (64, 64), (256, 256), (16, 256), (64, 1024), (512, 512), (256, 2048))
MOST_DECODE_TOKENS = 16384
ROUNDS = 7
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

    `methods` in order of importance: where preparing them takes more than half of `budget_s`, the
    rest is left out. The head is timed up to `most_sampled` rows; beyond, its time goes on as it
    rose.
    """
    begin = clock()
    with torch.inference_mode():
        forms = [own_layers(decoder, own)]
        for method in methods:
            spent = clock() - begin
            if spent + spent / len(forms) > budget_s / 2:
                break
            forms.append(random_layers(decoder, method))
        times = [LinearTimes(form.method) for form in forms]
        ladder = row_ladder(most_rows)
        left = budget_s - (clock() - begin)
        for place, rows in enumerate(ladder):
            # Out of time, only the ends of the curve are measured: between them it is straight.
            if left < 0 and 0 < place < len(ladder) - 1:
                continue
            start = clock()
            share = left / (len(ladder) - place)
            _time_linears(decoder, forms, times, rows, rows <= most_sampled, share)
            left -= clock() - start
    return times


def row_ladder(most_rows: int) -> list[int]:
    """The rows to time, up to those of the largest step, which is among them."""
    return [*(rows for rows in ROWS if rows < most_rows), most_rows]


def _time_linears(
    decoder: Decoder,
    forms: list[LinearLayers],
    times: list[LinearTimes],
    rows: int,
    with_head: bool,
    budget_s: float,
) -> None:
    passes = [_cut(form.runs(decoder, rows)) for form in forms]
    # The head comes after layers, as in a step: they have taken the cache meanwhile.
    heads = [form.head_run(decoder, rows) if with_head else None for form in forms]
    measured = _take_turns(decoder, passes, heads, forms[0].nbytes, budget_s)
    for form, entry, (layer_s, head_s) in zip(forms, times, measured, strict=True):
        entry.rows.append(rows)
        entry.layers_s.append(layer_s * form.num_layers)
        if with_head:
            entry.head_s.append(head_s)
        else:
            entry.head_s.append(entry.head_s[-1] * rows / entry.rows[-2])


def probe_attention(
    decoder: Decoder,
    cache_dtypes: Mapping[str, torch.dtype],
    block_size: int,
    longest: int,
    most_sequences: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, AttentionTimes]:
    """Time attention over caches of the dtypes, by their names; `longest` context in tokens."""
    times = {name: AttentionTimes() for name in cache_dtypes}
    decodes = [
        (count, context)
        for count in DECODES
        if count <= most_sequences
        for context in _contexts(longest)
        if count * context <= MOST_DECODE_TOKENS or context == min(CONTEXTS)
    ]
    chunks = [(new, context) for new, context in CHUNKS if context <= longest]
    chunks = chunks or [(longest, longest)]
    with torch.inference_mode():
        end = clock() + budget_s
        most = max(count * context for count, context in [*decodes, *chunks])
        layers = [
            AttentionLayers.make(decoder, dtype, block_size, most)
            for dtype in cache_dtypes.values()
        ]
        ends = _ends(decodes)
        # (new tokens of each sequence, context, is a chunk); the rest is for the time that is left.
        shapes = [((1,) * count, context, False) for count, context in ends]
        shapes += [((new,), context, True) for new, context in chunks]
        needed = len(shapes)
        shapes += [((1,) * count, context, False) for count, context in decodes]
        for place, (lens, context, is_chunk) in enumerate(shapes):
            if place >= needed and (clock() > end or (len(lens), context) in ends):
                continue
            share = (end - clock()) / (len(shapes) - place)
            passes = [_cut(each.runs(decoder, lens, context)) for each in layers]
            nbytes = layers[0].caches[0].nbytes
            measured = _take_turns(decoder, passes, [None] * len(passes), nbytes, share)
            for each, entry, (seconds, _) in zip(layers, times.values(), measured, strict=True):
                if is_chunk:
                    entry.chunk_tokens.append(lens[0])
                    entry.chunk_contexts.append(context)
                    entry.chunk_seconds.append(seconds * each.num_layers)
                else:
                    entry.sequences.append(len(lens))
                    entry.contexts.append(context)
                    entry.seconds.append(seconds * each.num_layers)
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


def _take_turns(
    decoder: Decoder,
    passes: Sequence[Runs],
    lasts: Sequence[Callable[[], object] | None],
    nbytes: int,
    budget_s: float,
) -> list[tuple[float, float]]:
    """Seconds of one run of each, and of what comes after its pass, from rounds in turn.

    The lower quartile of each; a pass that nothing comes after has 0 there.
    """
    if decoder.device.type == "cuda":
        return [
            (
                _on_cuda(decoder.device, runs, nbytes),
                0.0 if last is None else _on_cuda(decoder.device, [last], nbytes),
            )
            for runs, last in zip(passes, lasts, strict=True)
        ]
    samples: list[list[tuple[float, float]]] = [[] for _ in passes]
    begin = time.perf_counter()
    for done in range(ROUNDS):
        for runs, last, found in zip(passes, lasts, samples, strict=True):
            _pass(runs)  # those before took the cache
            found.append(_sample(runs, last))
        # Two rounds, unless one has taken it all: what was met for the first time takes longer.
        spent = time.perf_counter() - begin
        if spent * (done + 2) / (done + 1) > budget_s and (done >= 1 or spent > budget_s):
            break
    return [(_low([run for run, _ in found]), _low([end for _, end in found])) for found in samples]


def _low(seconds: list[float]) -> float:
    if len(seconds) == 1:  # there was time for one round
        return seconds[0]
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _sample(runs: Runs, last: Callable[[], object] | None) -> tuple[float, float]:
    """Seconds of one run and of the last, over as many passes as take long enough for the clock."""
    passes, running, ending = 0, 0.0, 0.0
    while True:
        start = time.perf_counter()
        _pass(runs)
        middle = time.perf_counter()
        running += middle - start
        if last is not None:
            last()
            ending += time.perf_counter() - middle
        passes += 1
        if running > SHORTEST_SAMPLE_S:
            return running / passes / len(runs), ending / passes


def _pass(runs: Runs) -> None:
    for run in runs:
        run()


def _on_cuda(device: torch.device, runs: Runs, nbytes: int) -> float:
    # Steps of decodes are captured there: what the host takes to launch is no part of them.
    from kernels.triton.cuda_timer import CudaTimer

    timer = CudaTimer(device, seconds=0.01)
    return timer(Operation("probe", runs, nbytes))().median  # type: ignore[arg-type]
