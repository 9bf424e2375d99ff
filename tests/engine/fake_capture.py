"""Graphs without CUDA: a replay runs the captured function again, on the memory it was given."""

from __future__ import annotations

from collections.abc import Callable

import torch


class FakeCapture:
    """Counts what it is asked for; `fitting` captures are granted before memory is gone.

    With `rehearses` off only the first rehearsal runs, of the largest shape.
    """

    def __init__(self, fitting: int = 1000, *, rehearses: bool = True) -> None:
        self.fitting = fitting
        self.rehearses = rehearses
        self.rehearsed = 0
        self.captured = 0
        self.replayed = 0

    def rehearse(self, step: Callable[[], None]) -> None:
        """Run it."""
        self.rehearsed += 1
        if self.rehearses or self.rehearsed == 1:
            step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What runs it again; nothing runs now, as in a real capture."""
        if self.captured == self.fitting:
            raise torch.OutOfMemoryError("fake")
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay
