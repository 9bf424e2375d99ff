"""Choosing tokens in plain PyTorch: see ``kernels.sampling``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates that top-p looks at first: sorting a whole vocabulary costs milliseconds a sequence,
# and what top_p < 1 keeps is nearly always among the likeliest few.
_CANDIDATES = 512
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class DrawParameters:
    """How each row's token is drawn.

    `temperature` 0 takes the likeliest; `top_k` 0 or below keeps all, as do `top_p` 1 and `min_p`
    0; `uniform` in [0, 1) is the row's chance.
    """

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    uniform: Sequence[float]

    def rows(self, wanted: Sequence[int]) -> "DrawParameters":
        """Those of some rows."""
        return DrawParameters(
            [self.temperature[i] for i in wanted],
            [self.top_k[i] for i in wanted],
            [self.top_p[i] for i in wanted],
            [self.min_p[i] for i in wanted],
            [self.uniform[i] for i in wanted],
        )


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


def likeliest_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row and its share of the softmax."""
    tokens = likeliest(logits)
    wide = logits.float()
    highest = wide.gather(1, tokens.unsqueeze(1))
    return tokens, (wide - highest).exp_().sum(dim=-1).reciprocal_()


def change_logits(logits: Tensor, places: Tensor, factors: Tensor, amounts: Tensor) -> None:
    """Change single logits in place; logits must be contiguous."""
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / factors, values * factors) - amounts
    flat[places] = values.masked_fill_(amounts == float("inf"), float("-inf"))


def draw(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """A token for each row; logits float [S, vocabulary] -> int64 [S]."""
    chance = [i for i, t in enumerate(parameters.temperature) if t > 0.0]
    if len(chance) == len(parameters.temperature):
        return _draw_all(logits.float(), parameters)
    chosen = likeliest(logits)
    if chance:
        picked = _draw_all(logits[chance].float(), parameters.rows(chance))
        chosen[torch.tensor(chance, device=chosen.device)] = picked
    return chosen


def probabilities(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """What `draw` draws from; logits float [S, vocabulary] -> float32 [S, vocabulary]."""
    chance = [i for i, t in enumerate(parameters.temperature) if t > 0.0]
    if len(chance) == len(parameters.temperature):
        return _probabilities_all(logits.float(), parameters)
    chosen = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    chosen.scatter_(1, likeliest(logits).unsqueeze(1), 1.0)
    if chance:
        chosen[chance] = _probabilities_all(logits[chance].float(), parameters.rows(chance))
    return chosen


def invert(masses: Tensor, draws: Tensor) -> Tensor:
    """The first index at which the cumulative sum exceeds `draw * total`.

    masses float32 [S, n], need not sum to 1; draws float64 [S, 1] in [0, 1) -> [S]. A zero mass is
    never chosen: the comparison is strict, so a flat stretch of the sum is skipped.
    """
    sums = masses.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1)
    # Only NaN rows get beyond the end.
    return index.clamp_(max=masses.shape[1] - 1)


def _draw_all(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """Tokens drawn after temperature and filters; logits float32 [S, vocabulary] -> [S]."""
    device = logits.device
    draws = torch.tensor(parameters.uniform, dtype=torch.float64, device=device).unsqueeze(1)
    tempered = _tempered(logits, parameters)
    filtered, top_k, top_p = _filters(parameters, logits.shape[1])
    if not filtered:
        return invert(tempered, draws)
    if len(filtered) == len(tempered):
        return _draw_filtered(tempered, top_k, top_p, draws)
    chosen = invert(tempered, draws)
    some = torch.tensor(filtered, device=device)
    chosen[some] = _draw_filtered(tempered[some], top_k, top_p, draws[some])
    return chosen


def _probabilities_all(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """`_draw_all`'s distributions; logits float32 [S, vocabulary] -> float32 [S, vocabulary]."""
    masses = _tempered(logits, parameters)
    filtered, top_k, top_p = _filters(parameters, logits.shape[1])
    if filtered:
        some = torch.tensor(filtered, device=logits.device)
        indices, kept = _kept(masses[some], top_k, top_p)
        masses[some] = torch.zeros_like(masses[some]).scatter_(1, indices, kept)
    return masses.div_(masses.sum(dim=-1, keepdim=True, dtype=torch.float64))


def _tempered(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """Masses after temperature and min-p; float32 [S, vocabulary] -> the same."""
    temperature = _column(parameters.temperature, logits.device)
    # A temperature that float32 rounds to 0 would make NaN of the maximum.
    temperature.clamp_(min=torch.finfo(torch.float32).tiny)
    # Subtracting the maximum first: a tiny temperature must not overflow to inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    masses = torch.softmax(scaled, dim=-1)
    if any(parameters.min_p):
        floor = masses.amax(dim=-1, keepdim=True) * _column(parameters.min_p, logits.device)
        masses = masses.masked_fill(masses < floor, 0.0)
    return masses


def _filters(
    parameters: DrawParameters, vocabulary: int
) -> tuple[list[int], list[int], list[float]]:
    """The rows that top-k or top-p filters, and these rows' top-k (0: none) and top-p."""
    top_k = [k if 0 < k < vocabulary else 0 for k in parameters.top_k]
    filtered = [i for i, p in enumerate(parameters.top_p) if top_k[i] or p < 1.0]
    return filtered, [top_k[i] for i in filtered], [parameters.top_p[i] for i in filtered]


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def _draw_filtered(
    masses: Tensor, top_k: Sequence[int], top_p: Sequence[float], draws: Tensor
) -> Tensor:
    """Draw after top-k, then top-p; masses float32 [S, vocabulary], draws float64 [S, 1] -> [S]."""
    indices, kept = _kept(masses, top_k, top_p)
    return indices.gather(1, invert(kept, draws).unsqueeze(1)).squeeze(1)


def _kept(masses: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What top-k keeps, then top-p of what it left, as vLLM orders them.

    Both keep all tokens as likely as the last one kept, so that the choice among equals does not
    depend on how a sort happens to order them.

    masses float32 [S, vocabulary] -> token ids int64 [S, n], rising, and their masses float32
    [S, n], 0 where a token is not kept; tokens that are not among them are not kept.
    """
    vocabulary = masses.shape[1]
    device = masses.device
    total = masses.sum(dim=-1, keepdim=True, dtype=torch.float64)
    limits = torch.tensor([k or vocabulary for k in top_k], device=device).unsqueeze(1)
    shares = torch.tensor(top_p, dtype=torch.float64, device=device).unsqueeze(1)
    width = max(_CANDIDATES, 2 * max(top_k))
    while True:
        width = min(width, vocabulary)
        values, indices = masses.topk(width, dim=-1)
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
    return indices, values.masked_fill(values < threshold, 0.0).gather(1, order)
