"""The driver's side of tensor parallelism: rank 0, which starts the others and tells them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError, first_line
from engine.packed_step import StepHeader
from engine.parallel import GroupRanks, leave
from engine.parallel_messages import command_bytes, step_bytes
from engine.parallel_processes import WorkerProcesses


class DriverRanks(GroupRanks):
    """Rank 0 of `size`; the others are processes of their own.

    They are ended by `close`, when this object is gone, or with this process.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(0, size, device)
        self._folder = Path(tempfile.mkdtemp(prefix="autotune-ranks-"))
        self.workers = WorkerProcesses(size, _aborting(weakref.ref(self)))
        self._joined: list[Any] = []
        self._end = weakref.finalize(self, _end, self.workers, self._joined, self._folder)

    @property
    def failure(self) -> EngineError | None:  # type: ignore[override]
        """Why the ranks are of no more use, if they are not."""
        return self.workers.failure

    def start(self, **arguments: Any) -> None:
        """Start the others, which load their weights meanwhile; plain JSON, as they take it."""
        self.workers.start({**arguments, "meeting": str(self._meeting)})

    def meet(self) -> None:
        """Wait until the others have their weights, and join them.

        Raises:
            EngineError: a rank failed; of the type that it raised.
        """
        self.workers.wait_until_loaded()
        with self.uninterrupted():
            self.tell("join")
            try:
                self.join(self._meeting)
            finally:
                if self._group is not None:
                    self._joined.append(self._group)

    def tell(self, command: str, **arguments: Any) -> None:
        """Let the others do this too."""
        self.workers.send(command_bytes(command, arguments))

    def step(self, header: StepHeader, words: Tensor, draft: bool = False) -> None:
        """Let the others compute this step, of the model or of its draft model."""
        self.workers.send(step_bytes(header, words, draft))

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """A Ctrl-C waits for the end of what is inside."""
        return interrupts_wait()

    @contextlib.contextmanager
    def lockstep(self) -> Iterator[None]:
        """What fails inside ends the other ranks."""
        self.workers.check()
        with self.uninterrupted():
            try:
                yield
            except BaseException as error:
                self.workers.fail(
                    EngineError(
                        f"rank 0 of {self.size} failed in a step ({type(error).__name__}: "
                        f"{first_line(error)}): load the model again"
                    )
                )
                raise
            # A group that was given up ends the device's waiting too, with any result.
            self.workers.check()

    def check(self, error: Exception | None = None) -> None:
        """Raise the failure, if there is one; with an error there is.

        Raises:
            EngineError: the ranks are of no more use.
        """
        if error is not None:
            self._failed(error)
        self.workers.check()

    def close(self) -> None:
        """End the others."""
        self._end()
        self._group = None

    @property
    def _meeting(self) -> Path:
        return self._folder / "meeting"

    def _failed(self, error: Exception) -> None:
        """Say which rank is lost, if one is.

        Raises:
            EngineError: always.
        """
        self.workers.explain(
            EngineError(f"rank 0 of {self.size} lost the others: {first_line(error)}")
        )


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let a Ctrl-C take effect at the end; a second one does at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if noted and callable(before):
            before(noted[0], None)


def _aborting(driver: weakref.ref[DriverRanks]) -> Any:
    """What ends the driver's waiting for ranks that will not come; it does not keep the driver."""

    def abort() -> None:
        ranks = driver()
        if ranks is not None:
            ranks.abort()

    return abort


def _end(workers: WorkerProcesses, joined: list[Any], folder: Path) -> None:
    workers.close()
    for group in joined:
        leave(group)
    joined.clear()
    shutil.rmtree(folder, ignore_errors=True)
