"""What is asked of CUDA, on a CUDA that only takes notes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.cuda_capture import CudaCapture, side_stream
from engine.device_memory import CudaMemory
from engine.graphs import NotCapturable
from engine.stopwatch import CudaStopwatch, HostStopwatch, stopwatch_for

GPU = torch.device("cuda")


class FakeCuda:
    """Stands in for `torch.cuda`; `log` has what happened in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = 0
        self.mode = 0
        self.now = 0.0
        cuda = self

        class Stream:
            def __init__(self, device: object = None) -> None:
                self.name = "side"
                cuda.streams += 1

            def wait_stream(self, other: Stream) -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                assert self.at >= 0
                cuda.log.append("synchronize")

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3  # milliseconds

        class CUDAGraph:
            def replay(self) -> None:
                cuda.log.append("replay")

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.current = Stream()
        self.current.name = "current"

    def current_stream(self, device: object) -> Any:
        return self.current

    def set_stream(self, stream: Any) -> None:
        self.log.append(f"set {stream.name}")

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")

    @contextmanager
    def graph(
        self, graph: object, pool: object, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        self.log.append(f"capture on {stream.name} in {pool}, {capture_error_mode}")
        yield

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        warnings.warn("a prototype feature", UserWarning, stacklevel=2)  # as PyTorch, once
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(str(mode), 0)

    def wait(self) -> None:
        """As `Tensor.item`."""
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    for name in dir(fake):
        if not name.startswith("_") and hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    side_stream.cache_clear()
    yield fake
    side_stream.cache_clear()


def test_all_captures_of_a_device_have_one_stream(cuda: FakeCuda) -> None:
    before = cuda.streams
    for _ in range(3):
        CudaCapture(GPU).rehearse(lambda: None)
    assert cuda.streams == before + 1


def test_a_rehearsal_runs_beside_and_then_refuses_to_wait(cuda: FakeCuda) -> None:
    modes: list[int] = []
    CudaCapture(GPU).rehearse(lambda: modes.append(cuda.mode))
    assert modes == [0, 2]
    assert cuda.mode == 0
    assert cuda.log == [
        "side waits for current",
        "on side",
        "off side",
        "current waits for side",
    ]


def test_a_step_that_waits_is_found_before_it_is_captured(cuda: FakeCuda) -> None:
    with pytest.raises(NotCapturable, match="waits for the device"):
        CudaCapture(GPU).rehearse(cuda.wait)
    assert cuda.mode == 0
    assert cuda.log[-1] == "current waits for side"

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaCapture(GPU).rehearse(full)


def test_graphs_share_a_pool_and_other_threads_may_go_on(cuda: FakeCuda) -> None:
    capture = CudaCapture(GPU)
    replays = [capture.capture(lambda: cuda.log.append("step")) for _ in range(2)]
    assert cuda.log == ["capture on side in pool, thread_local", "step"] * 2
    replays[1]()
    assert cuda.log[-1] == "replay"

    def refused() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\n...")

    with pytest.raises(NotCapturable, match="not permitted"):
        capture.capture(refused)
    assert cuda.log[-1] == "set current"


def test_the_first_error_of_a_failed_capture_counts(cuda: FakeCuda) -> None:
    def full() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    with pytest.raises(torch.OutOfMemoryError):
        CudaCapture(GPU).capture(full)


def test_seconds_between_events(cuda: FakeCuda) -> None:
    watch = stopwatch_for(GPU)
    assert isinstance(watch, CudaStopwatch)
    cuda.now = 1.0
    watch.start()
    cuda.now = 1.25
    watch.stop()
    assert cuda.log == []  # nothing has waited so far
    assert watch.seconds() == pytest.approx(0.25)
    assert cuda.log == ["synchronize"]
    assert isinstance(stopwatch_for(torch.device("cpu")), HostStopwatch)


def test_memory_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def answer(name: str, value: object = None) -> None:
        def asked(*devices: object) -> object:
            calls.append(name)
            assert devices in ((GPU,), ())
            return value

        monkeypatch.setattr(torch.cuda, name, asked)

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        answer(name)
    answer("memory_reserved", 5)
    answer("max_memory_reserved", 7)
    answer("mem_get_info", (3, 11))
    memory = CudaMemory(GPU)
    memory.settle()
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert (memory.reserved(), memory.peak(), memory.free_and_total()) == (5, 7, (3, 11))
