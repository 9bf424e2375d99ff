"""Records of steps with drafts: of known chances, costs and lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.step_record import StepRecord
from tests.autotune.profiling.loads import step


def drafted_step(
    start: float,
    seconds: float,
    sequences: int,
    drafted: list[int],
    accepted: list[int],
    **more: float,
) -> StepRecord:
    """A step of decodes; `drafted` and `accepted` are tokens of those with a draft, chains all."""
    depth = max(drafted, default=0)
    return step(
        start,
        seconds,
        decode_sequences=sequences,
        sampled_sequences=sequences,
        drafted_tokens=sum(drafted),
        accepted_tokens=sum(accepted),
        drafted_by_depth=tuple(sum(d > at for d in drafted) for at in range(depth)),
        accepted_by_depth=tuple(sum(a > at for a in accepted) for at in range(depth)),
        **more,
    )


def drafted_load(
    count: int,
    *,
    k: int = 3,
    chance: float = 0.7,
    batch: Callable[[np.random.Generator], int] = lambda rng: 1,
    hit: float = 0.8,
    base: float = 10e-3,
    row: float = 1e-3,
    drafting: float = 0.5e-3,
    noise: float = 0.05,
    stay: float = 0.0,
    seed: int = 0,
) -> list[StepRecord]:
    """Steps whose time is `base + row * rows` with some noise, after `drafting` seconds a step.

    Each sequence has a draft of k tokens with the chance `hit`. Tokens are accepted with `chance`
    each; with `stay`, that is of a state which outlasts a step so often: all right or all wrong.
    """
    rng = np.random.default_rng(seed)
    at, steps, right = 0.0, [], True
    for _ in range(count):
        sequences = batch(rng)
        drafted = [k] * int(rng.binomial(sequences, hit))
        if rng.random() >= stay:
            right = bool(rng.random() < chance)
        accepted = []
        for _ in drafted:
            run = int((rng.random(k) < chance).cumprod().sum())
            accepted.append(run if not stay else k * right)
        seconds = (base + row * (sequences + sum(drafted))) * float(rng.lognormal(0, noise))
        steps.append(
            drafted_step(
                at, seconds, sequences, drafted, accepted, host=drafting, draft_seconds=drafting
            )
        )
        at += seconds + drafting
    return steps
