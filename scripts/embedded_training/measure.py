"""What the models have learned: held-out loss, counted baselines, the draft's acceptance."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from embedded_training.llama import Llama

Tokens = npt.NDArray[np.uint16]


@torch.no_grad()
def mean_loss(model: Llama, tokens: Tokens, window: int) -> float:
    """Nats per token of `tokens` in disjoint windows of `window` inputs, context within each."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        piece = torch.from_numpy(tokens[start : start + window + 1].astype(np.int64))
        if len(piece) < 2:
            break
        logits = model.logits(model.hidden(piece[None, :-1]))[0]
        total += float(F.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return total / count


def counting_losses(train: Tokens, held_out: Tokens, vocab_size: int) -> dict[str, float]:
    """Nats per token of a unigram and of a bigram model counted on `train`.

    The bigram is interpolated with the unigram by Witten-Bell: the weight of the unigram after a
    token is (distinct followers) / (distinct followers + occurrences).
    """
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64) + 1.0
    unigram = counts / counts.sum()
    index = train[:-1].astype(np.int64) * vocab_size + train[1:]
    pairs = np.bincount(index, minlength=vocab_size * vocab_size).reshape(vocab_size, vocab_size)
    seen = pairs.sum(axis=1)
    distinct = (pairs > 0).sum(axis=1)
    before, after = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    joint = pairs[before, after] + distinct[before] * unigram[after]
    whole = np.maximum(seen[before] + distinct[before], 1)
    bigram = np.where(seen[before] > 0, joint / whole, unigram[after])
    return {
        "unigram": float(-np.log(unigram[after]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }


@torch.no_grad()
def top1_agreement(target: Llama, draft: Llama, tokens: Tokens, window: int) -> float:
    """Share of positions in `tokens` where both models' most likely next token is the same."""
    same, count = 0, 0
    for start in range(0, len(tokens), window):
        piece = torch.from_numpy(tokens[start : start + window].astype(np.int64))[None]
        guesses = [m.logits(m.hidden(piece)).argmax(-1) for m in (target, draft)]
        same += int((guesses[0] == guesses[1]).sum())
        count += piece.shape[1]
    return same / count


@torch.no_grad()
def greedy_continuations(model: Llama, prompts: Tensor, new_tokens: int) -> Tensor:
    """`prompts` `[batch, length]` with `new_tokens` greedy tokens appended to each."""
    tokens = prompts
    for _ in range(new_tokens):
        last = model.hidden(tokens)[:, -1]
        tokens = torch.cat((tokens, model.logits(last).argmax(-1)[:, None]), dim=1)
    return tokens


@torch.no_grad()
def greedy_acceptance(
    target: Llama,
    draft: Llama,
    held_out: Tokens,
    *,
    guesses: int = 4,
    prompts: int = 48,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
) -> dict[str, float]:
    """Greedy speculation replayed on the target's own continuations of held-out prompts.

    A guess is accepted when the draft's top token, given the target's text so far, is the token
    the target wrote; a round ends at the first miss or after `guesses` hits and yields one token
    of the target's besides. Returns the share of positions guessed right, the mean number of
    guesses accepted a round, and the tokens a round yields.
    """
    starts = np.linspace(0, len(held_out) - prompt_tokens - 1, prompts).astype(int)
    batch = np.stack([held_out[s : s + prompt_tokens] for s in starts]).astype(np.int64)
    text = greedy_continuations(target, torch.from_numpy(batch), new_tokens)
    guessed = draft.logits(draft.hidden(text[:, :-1])).argmax(-1)[:, prompt_tokens - 1 :]
    hits = (guessed == text[:, prompt_tokens:]).numpy()
    rounds, accepted = 0, 0
    for row in hits:
        at = 0
        # Only rounds that could have run their full length count, or the end would bias the mean.
        while at + guesses < new_tokens:
            run = 0
            while run < guesses and row[at + run]:
                run += 1
            rounds, accepted, at = rounds + 1, accepted + run, at + run + 1
    return {
        "acceptance": float(hits.mean()),
        "guesses_per_round": float(guesses),
        "accepted_per_round": accepted / rounds,
        "tokens_per_round": accepted / rounds + 1.0,
    }


def bits_per_byte(nats_per_token: float, tokens: int, size: int) -> float:
    """Bits per byte of a text of `size` bytes cut into `tokens` tokens."""
    return nats_per_token * tokens / math.log(2) / size
