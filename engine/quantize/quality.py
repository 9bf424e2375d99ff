"""What a quantization costs: the change of perplexity and of the next-token distribution.

Both models read the same text; the reference is the model without quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from kernels.metadata import build_attention_metadata

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class TextScore:
    """How a model predicts a text that is cut into windows.

    `nll`: float32 [windows, window - 1], negative log-likelihood (nats) of each token but the
    first, given those before it in its window. `log_probs`: float16 [kept, vocabulary], the whole
    distribution at the first `kept` of these positions.
    """

    nll: Tensor
    log_probs: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return float(self.nll.double().mean().exp())


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """A model against its reference.

    `quality_loss` is perplexity / reference perplexity - 1, with a 95% interval: Student's t over
    the windows' mean differences of log-likelihood. `kl` is the mean, `kl_p99` the 99th percentile
    of KL(reference || model) per position, in nats. `top1_agreement` is the share of positions at
    which both find the same token likeliest.
    """

    perplexity: float
    reference_perplexity: float
    quality_loss: float
    quality_loss_low: float
    quality_loss_high: float
    kl: float
    kl_p99: float
    top1_agreement: float


def score_text(
    decoder: Decoder, token_ids: Sequence[int], window: int, keep_distributions: int
) -> TextScore:
    """Score a text in windows of `window` tokens, each on its own; a shorter rest is left out.

    Raises:
        ValueError: the text is shorter than one window, or a window than 2 tokens.
    """
    if window < 2 or len(token_ids) < window:
        raise ValueError(f"{len(token_ids)} tokens do not fill one window of {window}")
    blocks = list(range(-(-window // _BLOCK_SIZE)))
    cache = KVCache.allocate(decoder.spec, len(blocks), _BLOCK_SIZE, decoder.dtype, decoder.device)
    metadata = build_attention_metadata([blocks], [window], [window], _BLOCK_SIZE, decoder.device)
    positions = torch.arange(window, device=decoder.device)
    nll: list[Tensor] = []
    kept: list[Tensor] = []
    num_kept = 0
    with torch.inference_mode():
        for start in range(0, len(token_ids) - window + 1, window):
            ids = torch.tensor(token_ids[start : start + window], device=decoder.device)
            hidden = decoder.forward(ids, positions, cache.layers, [metadata] * len(cache.layers))
            log_probs = decoder.logits(hidden[:-1]).float().log_softmax(-1)
            nll.append(-log_probs.gather(1, ids[1:, None])[:, 0].cpu())
            if num_kept < keep_distributions:
                kept.append(log_probs[: keep_distributions - num_kept].half().cpu())
                num_kept += len(kept[-1])
    vocabulary = decoder.spec.vocab_size
    return TextScore(
        torch.stack(nll), torch.cat(kept) if kept else torch.empty((0, vocabulary)).half()
    )


def compare(model: TextScore, reference: TextScore) -> QualityLoss:
    """The loss of a model against its reference, both scored on the same text and windows."""
    difference = (model.nll.double() - reference.nll.double()).mean(dim=1)
    mean = float(difference.mean())
    margin = 0.0
    if len(difference) > 1:
        error = float(difference.std()) / math.sqrt(len(difference))
        margin = float(stats.t.ppf(0.975, len(difference) - 1)) * error
    # A few positions at a time: whole vocabularies in float64 would take gigabytes.
    chunks = zip(
        torch.split(reference.log_probs, 64), torch.split(model.log_probs, 64), strict=True
    )
    kl = torch.cat([_divergence(p.double(), q.double()) for p, q in chunks])
    return QualityLoss(
        perplexity=model.perplexity,
        reference_perplexity=reference.perplexity,
        quality_loss=_relative(mean),
        quality_loss_low=_relative(mean - margin),
        quality_loss_high=_relative(mean + margin),
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(
            (reference.log_probs.argmax(-1) == model.log_probs.argmax(-1)).double().mean()
        ),
    )


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats by row, from logarithms of probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _relative(nats: float) -> float:
    """exp(nats) - 1; infinite where it overflows, as with broken weights."""
    return float(torch.tensor(nats, dtype=torch.float64).expm1())
