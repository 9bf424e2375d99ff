"""What Medusa heads learn from: a model's hidden states, and the tokens that came after them.

Two kinds of sequences: windows of the user's text, and what the model itself writes after prompts
cut from it (self-distillation). The latter is what the heads will draft for; the former is how the
user's requests read.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.errors import BadInput, Interrupted
from engine.engine import Engine
from engine.models.decoder import Decoder
from engine.request import Request, SamplingParams
from engine.speculate.medusa_states import hidden_states

# Of the windows, so many are held out, with all that is written after them.
HELD_OUT_SHARE = 0.1
LEAST_WINDOWS = 4
LEAST_PROMPT = 8
NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens in a row; what follows the state at the place `first`, or a later one, is guessed."""

    token_ids: list[int]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """Places to learn from, or to be judged by.

    states: [N, hidden] in the model's dtype, after the final norm. targets: int64 [N, heads], what
    head i should guess there: the token i + 2 places further on, `NO_TARGET` where there is none.
    """

    states: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.states)


def cut_windows(
    texts: Sequence[Sequence[int]], length: int, most_tokens: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of texts of token ids, to learn from and held out, as `seed` draws them.

    A text's rest joins them if it is at least half a window. Of more than `most_tokens`, some are
    left out.

    Raises:
        BadInput: they are fewer than `LEAST_WINDOWS`.
    """
    windows = [
        list(text[start : start + length])
        for text in texts
        for start in range(0, len(text), length)
        if len(text) - start >= length // 2
    ]
    if len(windows) < LEAST_WINDOWS:
        raise BadInput(
            f"the text has {sum(map(len, texts))} tokens, too few to learn from: give at least "
            f"{LEAST_WINDOWS * length}, and better some ten thousand"
        )
    random.Random(seed).shuffle(windows)
    windows = windows[: max(LEAST_WINDOWS, most_tokens // length)]
    held_out = max(1, round(len(windows) * HELD_OUT_SHARE))
    return windows[held_out:], windows[:held_out]


def write_on(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    most_tokens: int,
    seed: int,
    *,
    enough: Callable[[], bool] = lambda: False,
    on_tokens: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> list[Passage]:
    """What the model likeliest writes after the beginnings of windows, up to `most_tokens`.

    Windows are taken in turn, each with another length of its beginning every time, and written on
    for half their length. Ends early, with what there is, once `enough` says so; `on_tokens` hears
    how many tokens that are.

    Raises:
        Interrupted: `stop` was set.
    """
    draw = random.Random(seed)
    prompts = itertools.cycle(windows)
    ids = itertools.count()
    unfinished: dict[str, Request] = {}
    passages: list[Passage] = []
    begun = written = 0
    while not enough():
        if stop is not None and stop.is_set():
            _clear(engine)
            raise Interrupted("stopped while the model wrote text to learn from")
        while engine.num_unfinished < engine.config.max_num_seqs and begun < most_tokens:
            window = next(prompts)
            length = max(1, len(window) // 2)
            prompt = window[: draw.randint(min(LEAST_PROMPT, length), length)]
            request_id = f"passage-{next(ids)}"
            sampling = SamplingParams(temperature=0.0, max_tokens=length)
            unfinished[request_id] = engine.add(request_id, prompt, sampling)
            begun += length
        if not engine.has_unfinished:
            break
        for output in engine.step():
            written += len(output.token_ids)
            if output.finish_reason is not None:
                passages.append(_passage(unfinished.pop(output.request_id)))
        on_tokens(written)
    # What was begun is as good as far as it goes.
    passages += [_passage(request) for request in unfinished.values()]
    _clear(engine)
    return passages


def _passage(request: Request) -> Passage:
    return Passage(list(request.token_ids), request.num_prompt_tokens - 1)


def _clear(engine: Engine) -> None:
    engine.abort_all()
    engine.step()


def take_samples(decoder: Decoder, passages: Sequence[Passage], num_heads: int) -> Samples:
    """The states and targets of all places of passages that a head can guess for."""
    states, targets = [], []
    usable = [passage for passage in passages if len(passage.token_ids) - passage.first > 2]
    all_states = hidden_states(decoder, [passage.token_ids for passage in usable])
    for passage, own in zip(usable, all_states, strict=True):
        last = len(passage.token_ids) - 2  # beyond it there is nothing to guess
        states.append(own[passage.first : last])
        padded = torch.tensor([*passage.token_ids, *[NO_TARGET] * num_heads])
        windows = padded.unfold(0, num_heads, 1)
        targets.append(windows[passage.first + 2 : last + 2])
    if not states:
        size = (0, decoder.spec.hidden_size)
        empty = torch.empty(size, dtype=decoder.dtype, device=decoder.device)
        return Samples(empty, torch.empty((0, num_heads), dtype=torch.int64, device=empty.device))
    return Samples(torch.cat(states), torch.cat(targets).to(decoder.device))
