"""Capturing steps with CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from engine.errors import first_line
from engine.graphs import NotCapturable


class CudaCapture:
    """Graphs that share one memory pool, captured on a stream of their own.

    They must be replayed one after the other on one stream, and a graph's results be read before
    the next replay. A capture that fails halfway leaves PyTorch's allocator in a bad state (fixed
    after 2.11), so a rehearsal finds what can go wrong beforehand.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, step: Callable[[], None]) -> None:
        """Run the step twice: kernels are compiled and set up, then nothing may wait."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                step()
                with waits_refused():
                    step()
        finally:
            current.wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture the step; other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails at its end stays on its stream
            raise reason(error) from error
        return graph.replay


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps of a device are captured on.

    One for all, as cuBLAS keeps a workspace for each stream that it was ever called on.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def waits_refused() -> Iterator[None]:
    """Let whatever makes the host wait for the device fail.

    Raises:
        NotCapturable: something did.
    """
    before = torch.cuda.get_sync_debug_mode()
    _refuse_waits("error")
    try:
        yield
    except RuntimeError as error:
        raise reason(error) from error
    finally:
        _refuse_waits(before)


def _refuse_waits(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch tells that the mode does not find everything yet
        torch.cuda.set_sync_debug_mode(mode)


def reason(error: RuntimeError) -> Exception:
    """What a failure to rehearse or capture means.

    Ending a capture that has failed fails once more, so the first error of a chain counts.
    """
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    first = first_line(error)
    # Instantiating a graph takes memory of the driver's, whose lack comes as a plain CUDA error.
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in first.lower():
        return torch.OutOfMemoryError(first)
    if "synchroniz" in first.lower():
        return NotCapturable("an operation waits for the device")
    return NotCapturable(first)
