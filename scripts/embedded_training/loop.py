"""The training loop: Muon for matrices, AdamW for the rest, a schedule that ends when time does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from embedded_training.llama import Llama

Tokens = npt.NDArray[np.uint16]
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn.

    `minutes` of wall clock bound the run, so that the learning rate reaches zero whatever the
    machine's speed; with `steps` set, the step count does instead and the run is reproducible.
    """

    minutes: float
    steps: int | None = None
    muon_lr: float = 4e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of the run
    plateau: float = 0.35  # share of the run after which the rate falls linearly to zero
    long_from: float = 0.75  # share of the run after which windows are `long_window` tokens
    window: int = 512
    long_window: int = 2048
    micro_tokens: int = 4096
    step_tokens: int = 4096
    long_step_tokens: int = 4096
    peak: float = 1.0  # scales both learning rates
    ramp: int = 10  # steps until the rate is whole after a start: the optimizers' state is new

    def rate(self, progress: float) -> float:
        """Learning-rate factor in 0…1 at `progress` in 0…1."""
        if progress < self.warmup:
            return 0.05 + 0.95 * progress / self.warmup
        return min(1.0, max(0.0, (1.0 - progress) / (1.0 - self.plateau)))


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved beside each checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Save as JSON, under a temporary name first."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(path)


def windows(tokens: Tokens, length: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Windows of `length` + 1 tokens without end: each pass covers the stream once, shuffled."""
    while True:
        offset = int(rng.integers(length))
        count = (len(tokens) - offset - 1) // length
        for index in rng.permutation(count):
            start = offset + int(index) * length
            yield tokens[start : start + length + 1]


def next_token_loss(model: Llama) -> Objective:
    """Mean cross entropy in nats of `targets` `[batch, length]` given `inputs` of that shape."""

    def objective(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(model.hidden(inputs))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return objective


def distillation_loss(student: Llama, teacher: Llama, share: float = 0.8) -> Objective:
    """`share` of cross entropy to the teacher's distribution, the rest to the text itself.

    A draft is accepted when it guesses what the target says, so the target is what it learns; the
    text keeps it from copying the target's mistakes on tokens the target is sure of.
    """

    def objective(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.logits(teacher.hidden(inputs)).softmax(-1)
        logits = student.logits(student.hidden(inputs)).flatten(0, 1)
        soft = F.cross_entropy(logits, wanted.flatten(0, 1))
        return share * soft + (1.0 - share) * F.cross_entropy(logits, targets.flatten())

    return objective


def train(
    model: Llama,
    stages: Sequence[tuple[float, Objective]],
    tokens: Tokens,
    schedule: Schedule,
    *,
    seed: int,
    validate: Callable[[], float],
    save: Callable[[Progress], None],
    progress: Progress,
    compiled: bool,
    save_every_s: float = 120.0,
) -> Progress:
    """Train `model` in place on the stream `tokens` and return how far it got.

    `stages` are pairs of the share of the run (0…1, rising, the first 0) from which an objective
    holds, and that objective. `validate` returns a held-out loss in nats per token; `save` is
    called about every `save_every_s` seconds and at the end. A `progress` read from an earlier
    checkpoint continues its clock (the optimizer's state starts anew).
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=schedule.muon_lr,
            weight_decay=schedule.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=schedule.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [schedule.muon_lr, schedule.adamw_lr]
    runs = [
        (since, torch.compile(stage, dynamic=False) if compiled else stage)
        for since, stage in stages
    ]
    rng = np.random.default_rng(seed + progress.step)
    length = 0
    source: Iterator[Tokens] = iter(())
    started = time.monotonic() - progress.seconds
    saved = reported = time.monotonic()
    recent: list[float] = []
    reported_tokens, first_step = progress.tokens, progress.step
    limit_s = schedule.minutes * 60

    while True:
        progress.seconds = time.monotonic() - started
        share = progress.step / schedule.steps if schedule.steps else progress.seconds / limit_s
        if share >= 1.0:
            break
        wanted = schedule.long_window if share >= schedule.long_from else schedule.window
        if wanted != length:
            length, source = wanted, windows(tokens, wanted, rng)
        objective = [stage for since, stage in runs if share >= since][-1]
        is_long = share >= schedule.long_from
        step_tokens = schedule.long_step_tokens if is_long else schedule.step_tokens
        micro_batch = min(schedule.micro_tokens, step_tokens) // length
        accumulate = step_tokens // (micro_batch * length)
        ramp = min(1.0, (progress.step - first_step + 1) / schedule.ramp)
        rate = schedule.peak * ramp * schedule.rate(share)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        for _ in range(accumulate):
            batch = np.stack([next(source) for _ in range(micro_batch)]).astype(np.int64)
            pair = torch.from_numpy(batch)
            loss = objective(pair[:, :-1].contiguous(), pair[:, 1:].contiguous())
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
            recent.append(float(loss.detach()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {progress.step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += step_tokens

        now = time.monotonic()
        if now - reported >= 20.0:
            speed = (progress.tokens - reported_tokens) / (now - reported)
            mean = sum(recent) / len(recent)
            print(
                f"step {progress.step} | {progress.tokens / 1e6:.2f}M tokens | loss {mean:.3f}"
                f" | {speed:.0f} tok/s | rate {rate:.2f}"
                f" | {max(0.0, limit_s - (now - started)) / 60:.1f} min left",
                flush=True,
            )
            reported, reported_tokens = now, progress.tokens
            if now - saved >= save_every_s:
                held_out = validate()
                print(f"  held-out loss {held_out:.3f}", flush=True)
                progress.curve.append(
                    {
                        "step": progress.step,
                        "tokens": progress.tokens,
                        "train_loss": round(mean, 4),
                        "held_out_loss": round(held_out, 4),
                    }
                )
                save(progress)
                saved = time.monotonic()
            recent.clear()
    save(progress)
    return progress
