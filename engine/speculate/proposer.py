"""The interface of everything that drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from engine.request import Request
from engine.speculate.draft import Draft


class Proposer(Protocol):
    """Drafts what may follow.

    `costs_device` says whether proposing takes the model's device (or, on a CPU, its cores) for
    longer than looking something up, so that it is worth deciding beforehand who is drafted for.
    """

    costs_device: bool

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        """A draft for each request, of at most as many tokens as its limit; None for no idea.

        Every request decodes: all its tokens but the last are computed. Limits may be 0. Called
        between two steps, once at most; not every request is asked about before every step.
        """
        ...

    def clear(self) -> None:
        """Forget what was kept of requests that have left, for instance between measurements."""
        ...

    def forget(self, request: Request) -> None:
        """The request left, or will be computed again from the start (it was preempted)."""
        ...


@runtime_checkable
class ChainProposer(Protocol):
    """A `Proposer` that makes chains token by token, and can end them where they promise little.

    `floor` is the chance, as it tells it of a chain's last token, below which it does not go on;
    whoever asks for drafts sets it before.
    """

    floor: float
