"""From logits to the next tokens of a batch, all sequences at once.

A request's choice depends on its own logits, its seed and its position, never on what runs beside
it or on how often it was preempted: chance is one uniform number per (seed, position), turned into
a token by inverting the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.request import Request, TokenLogprobs
from engine.uniform import request_seed, uniform

# Candidates that top-p looks at first: sorting a whole vocabulary costs milliseconds a sequence,
# and what top_p < 1 keeps is nearly always among the likeliest few.
_CANDIDATES = 512
_CHUNK = 256


@dataclass(slots=True)
class SampledTokens:
    """One token per row, and log-probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class Sampler:
    """Chooses tokens; `seed` is for requests that have none of their own."""

    def __init__(self, seed: int, eos_token_ids: Sequence[int]) -> None:
        self.seed = seed
        self._eos = tuple(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> SampledTokens:
        """Choose the next token of each request.

        logits: float [S, vocabulary], row i for requests[i]; may be changed in place. A row of NaN
        gives some token of the vocabulary.
        """
        params = [request.sampling for request in requests]
        want_logprobs = any(p.logprobs is not None for p in params)
        chance = [i for i, p in enumerate(params) if p.temperature > 0.0]
        changed = _rows_with_processors(requests)
        if not want_logprobs and not chance and not changed:
            return SampledTokens(likeliest(logits).tolist())
        raw = logits
        if changed:
            logits = logits.float().clone() if want_logprobs else logits.float()
            _apply_penalties(logits, changed, requests)
            self._mask_ends(logits, requests)
        chosen = likeliest(logits)
        if chance:
            rows = logits if len(chance) == len(params) else logits[chance]
            picked = self._draw(rows.float(), [requests[i] for i in chance])
            if len(chance) == len(params):
                chosen = picked
            else:
                chosen[torch.tensor(chance, device=chosen.device)] = picked
        token_ids: list[int] = chosen.tolist()
        return SampledTokens(
            token_ids, _logprobs(raw, token_ids, requests) if want_logprobs else []
        )

    def _draw(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Tokens drawn after temperature and filters; logits float32 [S, vocabulary] -> [S]."""
        device = logits.device
        params = [request.sampling for request in requests]
        temperature = _column([p.temperature for p in params], device)
        draws = torch.tensor(
            [
                uniform(request_seed(r.sampling.seed, self.seed, r.request_id), len(r.token_ids))
                for r in requests
            ],
            dtype=torch.float64,
            device=device,
        ).unsqueeze(1)
        # Subtracting the maximum first: a tiny temperature must not overflow to inf - inf.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        probabilities = torch.softmax(scaled, dim=-1)
        min_p = [p.min_p for p in params]
        if any(min_p):
            floor = probabilities.amax(dim=-1, keepdim=True) * _column(min_p, device)
            probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
        top_k = [p.top_k if 0 < p.top_k < logits.shape[1] else 0 for p in params]
        filtered = [i for i, p in enumerate(params) if top_k[i] or p.top_p < 1.0]
        if not filtered:
            return _invert(probabilities, draws)
        top_k, top_p = [top_k[i] for i in filtered], [params[i].top_p for i in filtered]
        if len(filtered) == len(params):
            return _draw_filtered(probabilities, top_k, top_p, draws)
        chosen = _invert(probabilities, draws)
        rows = torch.tensor(filtered, device=device)
        chosen[rows] = _draw_filtered(probabilities[rows], top_k, top_p, draws[rows])
        return chosen

    def _mask_ends(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Forbid end and stop tokens to requests that are below their `min_tokens`."""
        rows, columns = [], []
        for row, request in enumerate(requests):
            p = request.sampling
            if request.num_output_tokens >= p.min_tokens:
                continue
            ends = {*p.stop_token_ids, *(() if p.ignore_eos else self._eos)}
            for token in ends:
                if 0 <= token < logits.shape[1]:
                    rows.append(row)
                    columns.append(token)
        if rows:
            logits[rows, columns] = float("-inf")


def likeliest(logits: Tensor) -> Tensor:
    """The first index of each row's maximum; logits [S, vocabulary] -> int64 [S].

    On a CPU `argmax` takes 0.4 ms for a row of 49,152 bf16 and `amax`, which is vectorised, a
    twentieth: so the maximum of each chunk first, and `argmax` only over chunks and in one.
    """
    rows, columns = logits.shape
    if logits.device.type != "cpu" or columns < 4 * _CHUNK:
        return logits.argmax(dim=-1)
    whole = columns // _CHUNK
    highest = logits[:, : whole * _CHUNK].view(rows, whole, _CHUNK).amax(dim=-1)
    if columns % _CHUNK:
        rest = logits[:, whole * _CHUNK :].amax(dim=-1, keepdim=True)
        highest = torch.cat([highest, rest], dim=1)
    begin = highest.argmax(dim=-1, keepdim=True) * _CHUNK
    within = (begin + torch.arange(_CHUNK)).clamp_(max=columns - 1)
    return (begin + logits.gather(1, within).argmax(dim=-1, keepdim=True)).squeeze(1)


def _rows_with_processors(requests: Sequence[Request]) -> list[int]:
    """Rows whose logits are changed before the choice: by penalties or by `min_tokens`."""
    rows = []
    for row, request in enumerate(requests):
        p = request.sampling
        if (
            p.repetition_penalty != 1.0
            or p.presence_penalty != 0.0
            or p.frequency_penalty != 0.0
            or request.num_output_tokens < p.min_tokens
        ):
            rows.append(row)
    return rows


def _apply_penalties(logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> None:
    """Change logits (float32 [S, vocabulary], in place) as `SamplingParams` says.

    Order as in vLLM: repetition first, then frequency, then presence.
    """
    for row in rows:
        request = requests[row]
        p = request.sampling
        line = logits[row]
        if p.repetition_penalty != 1.0:
            seen = _inside(np.unique(np.asarray(request.token_ids)), logits)
            values = line[seen]
            line[seen] = torch.where(
                values > 0, values / p.repetition_penalty, values * p.repetition_penalty
            )
        if p.frequency_penalty == 0.0 and p.presence_penalty == 0.0:
            continue
        output = request.output_token_ids
        if output:
            tokens, counts = np.unique(np.asarray(output), return_counts=True)
            times = torch.from_numpy(counts).to(logits.device, torch.float32)
            line[_inside(tokens, logits)] -= p.frequency_penalty * times + p.presence_penalty


def _inside(tokens: np.ndarray[tuple[int], np.dtype[np.int64]], logits: Tensor) -> Tensor:
    return torch.from_numpy(tokens).to(logits.device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def _invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The first index at which the cumulative sum exceeds `draw * total`.

    probabilities float32 [S, n], need not sum to 1; draws float64 [S, 1] in
    [0, 1) -> [S]. A zero
    probability is never chosen: the comparison is strict, so a flat stretch of the sum is skipped.
    """
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1)
    # Only NaN rows get beyond the end.
    return index.clamp_(max=probabilities.shape[1] - 1)


def _draw_filtered(
    probabilities: Tensor, top_k: Sequence[int], top_p: Sequence[float], draws: Tensor
) -> Tensor:
    """Draw after top-k, then top-p of what it left, as vLLM orders them.

    Both keep all tokens as likely as the last one kept, so that the choice among equals does not
    depend on how a sort happens to order them.
    """
    vocabulary = probabilities.shape[1]
    device = probabilities.device
    total = probabilities.sum(dim=-1, keepdim=True, dtype=torch.float64)
    limits = torch.tensor([k or vocabulary for k in top_k], device=device).unsqueeze(1)
    shares = torch.tensor(top_p, dtype=torch.float64, device=device).unsqueeze(1)
    width = max(_CANDIDATES, 2 * max(top_k))
    while True:
        width = min(width, vocabulary)
        values, indices = probabilities.topk(width, dim=-1)
        least = values.gather(1, limits.clamp(max=width) - 1)
        values = values.masked_fill(values < least, 0.0) if any(top_k) else values
        sums = values.cumsum(dim=-1, dtype=torch.float64)
        bounds = shares * torch.where(limits < vocabulary, sums[:, -1:], total)
        # A token is needed while the likelier ones together are still below the bound.
        needed = (sums - values) < bounds
        needed[:, 0] = True
        threshold = values.masked_fill(~needed, 2.0).amin(dim=-1, keepdim=True)
        if width == vocabulary or not bool((values[:, -1:] >= threshold).any()):
            break
        width *= 8
    # In the order of token ids, so that the draw does not depend on `width` either.
    indices, order = indices.sort(dim=-1)
    kept = values.masked_fill(values < threshold, 0.0).gather(1, order)
    return indices.gather(1, _invert(kept, draws).unsqueeze(1)).squeeze(1)


def _logprobs(
    raw: Tensor, token_ids: Sequence[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens under the logits as the model gave them."""
    rows = [i for i, r in enumerate(requests) if r.sampling.logprobs is not None]
    widths = [requests[i].sampling.logprobs or 0 for i in rows]
    logprobs = torch.log_softmax(raw[rows].float(), dim=-1)
    picked = torch.tensor([token_ids[i] for i in rows], device=raw.device)
    chosen = logprobs.gather(1, picked.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(widths), raw.shape[1])
    values, indices = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0],) * 2
    out: list[TokenLogprobs | None] = [None] * len(requests)
    for i, row in enumerate(rows):
        ids = indices[i, : widths[i]].tolist()
        top = dict(zip(ids, values[i, : widths[i]].tolist(), strict=True))
        out[row] = TokenLogprobs(token_ids[row], chosen[i], top)
    return out
