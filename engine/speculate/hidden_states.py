"""What the model made of each request's tokens so far, for heads that draft from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import Request


class HiddenStates:
    """The hidden state after the final norm from which each request's newest token was chosen."""

    def __init__(self) -> None:
        # Of a request: a step's states, the row, and the tokens that it had then.
        self._rows: dict[str, tuple[Tensor, int, int]] = {}

    def keep(self, request: Request, states: Tensor, row: int, num_tokens: int) -> None:
        """Remember a row of a step's states [rows, hidden].

        `num_tokens` are the request's with the token that was chosen from it.
        """
        self._rows[request.request_id] = states, row, num_tokens

    def of(self, requests: Sequence[Request]) -> tuple[Tensor | None, list[int]]:
        """States [n, hidden] of those of the requests that have one, and their indices.

        None if nobody has. A request whose newest token was not chosen from what is remembered, as
        it was taken in with that token, has none.
        """
        present: list[int] = []
        states: list[Tensor] = []
        for index, request in enumerate(requests):
            kept = self._rows.get(request.request_id)
            if kept is not None and kept[2] == len(request.token_ids):
                present.append(index)
                states.append(kept[0][kept[1]])
        return (torch.stack(states) if states else None), present

    def forget(self, request: Request) -> None:
        """The request left."""
        self._rows.pop(request.request_id, None)
