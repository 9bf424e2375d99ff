"""Which tokens of a draft that was drawn by chance are accepted: exact rejection sampling.

A drafted token x, drawn from q where the model's distribution is p, is accepted with probability
min(1, p(x) / q(x)); at the first that is not, a token drawn from the positive part of p - q takes
its place; behind a draft that is accepted whole comes one drawn from p (Leviathan, Kalman and
Matias 2023; Chen et al. 2023). The tokens are then distributed as if each had been drawn from p.

This holds only if how many tokens are verified does not depend on which token the last of them, or
one after it, happens to be. What shortens a draft with `probabilities` may look at loads, at the
distributions and at the tokens before; not at the tokens that it drops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.speculate.draft import Draft
from engine.uniform import ACCEPTANCE, REDRAW, stream_seed, uniforms
from kernels import sampling


def accept_drawn(
    probabilities: Tensor,
    rows: Sequence[tuple[Draft, int]],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[list[int]]:
    """The accepted tokens of each draft, and one more.

    Waits for the device once.

    Args:
        probabilities: what the model would draw from, after penalties, temperature and filters;
            float32 [rows, vocabulary].
        rows: drafts, and each one's first row: that of the request's last token, whose
            distribution the first drafted token is held against. One row for each drafted token
            follows. A draft without `probabilities` counts as having been certain of its tokens.
        seeds: the requests' seeds, `engine.uniform.request_seed`.
        positions: the index, in the request's tokens, of the token that is chosen at the first
            row. With the seed it determines all chance here.

    Raises:
        ValueError: a draft is a tree.
    """
    if not rows:
        return []
    if any(draft.parents is not None for draft, _ in rows):
        raise ValueError("a tree cannot be verified by rejection sampling, only a chain")
    lengths = np.array([len(draft) for draft, _ in rows], dtype=np.int64)
    host = _uploaded(rows, lengths, seeds, positions)
    device = probabilities.device
    accept, redraw, first, start, length, index, token = torch.from_numpy(host).to(device).unbind()
    row, column, length = (first + index).long(), token.long(), length[:, 0]
    drawn_from = _drawn_from(rows, probabilities)
    last = len(drawn_from) - 1
    place = (start + index).long().clamp_(max=last)
    p = probabilities[row.clamp(max=len(probabilities) - 1), column]
    q = drawn_from[place, column]
    # Written so that a token of no chance is not accepted, nor one that q cannot have given.
    accepted = (accept * q < p) & (q > 0)
    count = accepted.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    wanted = probabilities[(first[:, 0] + count[:, 0]).long()]
    whole = (count[:, 0] == length).unsqueeze(1)
    taken = drawn_from[place.gather(1, count)[:, 0]].masked_fill_(whole, 0.0)
    residual = (wanted - taken).clamp_(min=0.0)
    # Nothing is left where rounding alone made p and q differ.
    empty = residual.sum(dim=1, keepdim=True) == 0
    residual = torch.where(empty, wanted, residual)
    more = sampling.draw_from(residual, redraw.gather(1, count)[:, 0])
    results: list[list[int]] = torch.stack([count[:, 0], more], dim=1).tolist()
    return [
        [*draft.token_ids[:number], one]
        for (draft, _), (number, one) in zip(rows, results, strict=True)
    ]


def _uploaded(
    rows: Sequence[tuple[Draft, int]],
    lengths: NDArray[np.int64],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> NDArray[np.float64]:
    """All that the host knows in one array, for one copy; float64 [7, drafts, 1 + most drafted].

    By draft and place: the chance for accepting the token there (infinite, which is never, where
    there is none), that for drawing in its place, the draft's first row, its first among all
    drafted tokens, its length, the place itself, and the token. Integers of less than 53 bits are
    exact.
    """
    count, width = len(rows), int(lengths.max(initial=0)) + 1
    index = np.arange(width)
    where = (np.array(positions)[:, None] + index).ravel().tolist()
    out = np.zeros((7, count, width))
    for stream, chances in ((ACCEPTANCE, out[0]), (REDRAW, out[1])):
        streams = [stream_seed(seed, stream) for seed in seeds]
        each = [one for one in streams for _ in range(width)]
        chances[:] = uniforms(each, where).reshape(count, width)
    drafted = index < lengths[:, None]
    out[0][~drafted] = np.inf
    out[2] = np.array([first for _, first in rows])[:, None]
    out[3] = (np.cumsum(lengths) - lengths)[:, None]
    out[4] = lengths[:, None]
    out[5] = index
    out[6][drafted] = [token for draft, _ in rows for token in draft.token_ids]
    return out


def _drawn_from(rows: Sequence[tuple[Draft, int]], probabilities: Tensor) -> Tensor:
    """What each drafted token was drawn from, of all drafts; float32 [drafted, vocabulary]."""
    parts = []
    for draft, _ in rows:
        if not len(draft):
            continue
        if draft.probabilities is not None:
            parts.append(draft.probabilities)
        else:
            tokens = torch.tensor(list(draft.token_ids), device=probabilities.device)
            certain = probabilities.new_zeros(len(draft), probabilities.shape[1])
            parts.append(certain.scatter_(1, tokens.unsqueeze(1), 1.0))
    return torch.cat(parts) if parts else probabilities.new_zeros(1, probabilities.shape[1])
