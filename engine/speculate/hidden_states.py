"""What the model made of each request's tokens so far, for heads to draft from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import ScheduledSequence
from engine.request import Request


class HiddenStates:
    """The hidden state after the final norm from which each request's newest token was chosen.

    Those of the last step suffice: whoever decodes was in it.
    """

    def __init__(self) -> None:
        self._sequences: Sequence[ScheduledSequence] = ()
        self._states: Tensor | None = None
        # Of requests some of whose drafted tokens were accepted: how many rows further.
        self._further: dict[Request, tuple[int, int]] = {}
        # Of each request of the step: its row, and its tokens with the one chosen from that.
        self._rows: dict[Request, tuple[int, int]] | None = None

    def begin(self, sequences: Sequence[ScheduledSequence], states: Tensor) -> None:
        """Remember a step's states [rows, hidden], in the place of the last step's.

        A row for each sequence that samples, and one for each of its drafted tokens.
        """
        self._sequences, self._states = sequences, states
        self._further.clear()
        self._rows = None

    def accept(self, request: Request, row: int, num_accepted: int) -> None:
        """A request's newest token was chosen `row` rows behind its first one."""
        self._further[request] = row, num_accepted

    def of(self, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """States [n, hidden] of those of the requests that have one, and their indices.

        One whose newest token was not chosen in the last step has none.
        """
        states = self._states
        if states is None:
            return torch.empty(0, 0), []
        if self._rows is None:
            self._rows = self._find_rows()
        present: list[int] = []
        rows: list[int] = []
        for index, request in enumerate(requests):
            row, num_tokens = self._rows.get(request, (0, -1))
            if num_tokens == len(request.token_ids):
                present.append(index)
                rows.append(row)
        return states[torch.tensor(rows, dtype=torch.int64, device=states.device)], present

    def _find_rows(self) -> dict[Request, tuple[int, int]]:
        found = {}
        row = 0
        for sequence in self._sequences:
            if sequence.samples:
                further, accepted = self._further.get(sequence.request, (0, 0))
                found[sequence.request] = row + further, sequence.known + accepted + 1
                row += 1 + sequence.num_drafted
        return found
