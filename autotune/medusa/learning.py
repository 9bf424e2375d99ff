"""How heads learn: Adam over shuffled places, the rate falling to zero by the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from autotune.medusa.samples import NO_TARGET, Samples
from engine.speculate.medusa_learning import LearningHeads

BATCH = 512
# Residual blocks begin at zero; outputs of their own begin as the model's and need less.
LEARNING_RATE = 3e-3
OUTPUT_LEARNING_RATE = 5e-4
_WARMUP_STEPS = 20
_BETAS = (0.9, 0.99)


def learn(
    heads: LearningHeads,
    samples: Samples,
    seed: int,
    *,
    done: Callable[[int], float],
    on_step: Callable[[int, list[float]], None] = lambda _step, _losses: None,
    stop: threading.Event | None = None,
) -> int:
    """Take steps until `done`, asked before each with the steps so far, says 1 or more.

    What it says is the share of the training that is over, by which the learning rate falls
    linearly. `on_step` hears of each step and of the heads' losses in it (nats). Ends early if
    `stop` is set. Returns the number of steps.
    """
    optimizer = torch.optim.Adam(
        [
            {"params": [*heads.weights, *heads.biases], "rate": LEARNING_RATE},
            {"params": heads.outputs, "rate": OUTPUT_LEARNING_RATE},
        ],
        lr=LEARNING_RATE,
        betas=_BETAS,
    )
    step = 0
    for chosen in _batches(len(samples), seed, samples.states.device):
        over = done(step)
        if over >= 1.0 or (stop is not None and stop.is_set()):
            break
        pace = min(1.0, (step + 1) / _WARMUP_STEPS) * (1.0 - over)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * pace
        losses = heads.losses(samples.states[chosen], samples.targets[chosen], NO_TARGET)
        optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        on_step(step, losses.tolist())
    return step


def _batches(count: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Places for ever: int64 [at most BATCH], all once before any again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).to(device)
        yield from torch.split(order, BATCH)
