"""Timing on a CUDA device as a step of a model runs: from a graph, on operands out of the cache."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.measure import Operation, Timing

LEAST_REPEATS = 5
MOST_REPEATS = 100
LONGEST_GRAPH_S = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """How an operation is timed: its first `runs` in one graph, replayed `repeats` times."""

    runs: int
    repeats: int
    flush: bool


def plan(operation: Operation, once: float, seconds: float, out_of_cache: int) -> Plan:
    """How to time an operation that takes about `once` seconds, in about `seconds` each time.

    Operands of `out_of_cache` bytes are rotated; where they are fewer the cache is flushed.
    """
    runs, flush = 1, operation.nbytes < out_of_cache
    if flush and len(operation.runs) * operation.nbytes >= out_of_cache:
        enough = -(-out_of_cache // max(1, operation.nbytes))
        runs = min(len(operation.runs), max(enough, int(LONGEST_GRAPH_S / once)))
        flush = False
    repeats = min(MOST_REPEATS, max(LEAST_REPEATS, int(seconds / (once * runs))))
    return Plan(runs, repeats, flush)


def waits_for_device(run: Callable[[], object]) -> bool:
    """Run something, and tell whether it makes the host wait for the device.

    What does cannot be captured, and a capture that fails leaves PyTorch's allocator in a bad state
    (fixed after 2.11): no later capture succeeds then.
    """
    before = torch.cuda.get_sync_debug_mode()
    _treat_waits("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        return True
    finally:
        _treat_waits(before)
    return False


def _treat_waits(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch tells that the mode does not find everything yet
        torch.cuda.set_sync_debug_mode(mode)


class CudaTimer:
    """Times operations with events around graph replays; about `seconds` for each.

    A captured step has no launch gaps, and its layers' weights come from memory, not from the
    cache. So operands that are together larger than three times the L2 cache are rotated inside
    the graph; otherwise a buffer of that size is overwritten before each replay. An operation that
    cannot be captured is timed launch by launch.
    """

    def __init__(self, device: torch.device, seconds: float = 0.03) -> None:
        self._device = device
        self._seconds = seconds
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        self._out_of_cache = 3 * max(cache, 32 << 20)
        self._flush: Tensor | None = None
        self._stream = torch.cuda.Stream(device)
        # One pool for all graphs: nobody reads their results, which may overwrite each other.
        self._pool = torch.cuda.graph_pool_handle()
        # A pool that no graph is in any more cannot be used again.
        self._keeper: torch.cuda.CUDAGraph | None = None

    def __call__(self, operation: Operation) -> Callable[[], Timing]:
        """Capture the operation, and return what times its replays."""
        with torch.cuda.device(self._device):
            once = self._once(operation.runs[0])
            how = plan(operation, once, self._seconds, self._out_of_cache)
            launch = self._captured(operation.runs[: how.runs])
        return lambda: self._timing(launch, how)

    def _once(self, run: Callable[[], Tensor]) -> float:
        """Seconds of one warm run, by which the number of repeats is chosen."""
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return max(1e-6, float(begin.elapsed_time(end)) / 1e3)

    def _timing(self, launch: Callable[[], None], how: Plan) -> Timing:
        with torch.cuda.device(self._device):
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(how.repeats + 1)
            ]
            for begin, end in events:
                if how.flush:
                    self._overwrite_cache()
                begin.record()
                launch()
                end.record()
            torch.cuda.synchronize(self._device)
        # The first replay pays for the upload of the graph.
        return Timing.of(
            [float(begin.elapsed_time(end)) / 1e3 / how.runs for begin, end in events[1:]]
        )

    def _captured(self, runs: Sequence[Callable[[], Tensor]]) -> Callable[[], None]:
        def plainly() -> None:
            for run in runs:
                run()

        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # Whatever a first call does on a stream happens before the capture.
                if waits_for_device(plainly):
                    return plainly
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool)
                try:
                    plainly()
                finally:
                    graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            self._pool = torch.cuda.graph_pool_handle()  # the old one may be left half-way
            return plainly
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._keeper = graph
        return graph.replay

    def _overwrite_cache(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(self._out_of_cache, dtype=torch.uint8, device=self._device)
        self._flush.zero_()
