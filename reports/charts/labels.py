"""Where the names of points stand, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence

_CHARACTER = 6.4  # pixels of a character of a label, on average
_HEIGHT = 13.0
_GAP = 9.0  # from the middle of a mark

Box = tuple[float, float, float, float]


def place_labels(
    labels: Sequence[tuple[float, float, str]],
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> list[tuple[float, float, str, str]]:
    """A (x, y, text, anchor) for each (x, y, text) of a mark, all in pixels.

    Each label stands right of its mark, above, below or left of it, or further off above or below:
    at the first of these that covers neither a mark nor an earlier label and stays in the plot.
    """
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in labels]
    placed = []
    for x, y, text in labels:
        width = _CHARACTER * len(text)
        candidates = [(x + _GAP, y - 5, "start"), (x - _GAP, y - 5, "end")]
        for rows in (1, -1, 2, -2, 3, -3):
            at = y - 5 - rows * _HEIGHT
            candidates += [(x + 4, at, "start"), (x - 4, at, "end")]
        chosen = next(
            (c for c in candidates if _fits(_box(c, width), taken, (left, top, right, bottom))),
            candidates[0],
        )
        taken.append(_box(chosen, width))
        placed.append((chosen[0], chosen[1], text, chosen[2]))
    return placed


def _box(place: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = place
    start = x - width if anchor == "end" else x
    return start, y - _HEIGHT + 3, start + width, y + 3


def _fits(box: Box, taken: Sequence[Box], plot: Box) -> bool:
    inside = box[0] >= plot[0] and box[1] >= plot[1] and box[2] <= plot[2] and box[3] <= plot[3]
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in taken
    )
