"""What a quantization costs: the change of perplexity and of the next-token distribution.

Both models read the same text; the reference is the model without quantization. Texts are cut into
windows, and every interval is one of differences between windows: see `engine.quantize.intervals`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.quantize.intervals import Values, bootstrap_interval, mean_interval
from kernels.layer_cache import LayerCache
from kernels.metadata import build_attention_metadata

_BLOCK_SIZE = 16
# Tokens of one forward pass: what comes later in a window reads what came before from the cache.
_CHUNK_TOKENS = 128
# Percentile of the divergence that is told beside its mean.
_TAIL = 0.99


@dataclass(frozen=True, slots=True)
class TextScore:
    """How a model predicts a text that is cut into windows.

    `nll`: float32 [windows, window - 1], negative log-likelihood (nats) of each token but the
    first, given those before it in its window. `log_probs`: float32 [windows, kept, vocabulary],
    the whole distribution at `kept` positions spread evenly over each window. Float32, as half
    precision would round a log-probability of -10 by up to 0.004, which is more than the divergence
    of a good int8 model.
    """

    nll: Tensor
    log_probs: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return float(self.nll.double().mean().exp())


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """A model against its reference, each figure with its 95% interval (`_low`, `_high`).

    `quality_loss` is perplexity / reference perplexity - 1. Its interval is the paired one: Student
    t over the windows' mean differences of log-likelihood, exponentiated. `kl` is the mean of
    KL(reference || model) per position in nats, Student t over the windows' means, not below 0.
    `kl_p99` is the 99th percentile of it over positions and `top1_agreement` the share of positions
    at which both models find the same token likeliest; their intervals are a seeded block bootstrap
    over windows. `windows` and `positions` count what `kl` and the last two rest on; with a single
    window nothing is known of the spread, so that intervals are infinite or of no width.
    """

    perplexity: float
    reference_perplexity: float
    quality_loss: float
    quality_loss_low: float
    quality_loss_high: float
    kl: float
    kl_low: float
    kl_high: float
    kl_p99: float
    kl_p99_low: float
    kl_p99_high: float
    top1_agreement: float
    top1_agreement_low: float
    top1_agreement_high: float
    windows: int
    positions: int


def score_text(
    decoder: Decoder,
    token_ids: Sequence[int],
    window: int,
    keep_distributions: int,
    cache_dtype: torch.dtype | None = None,
) -> TextScore:
    """Score a text in windows of `window` tokens, each on its own; a shorter rest is left out.

    Keys and values go through a paged cache of `cache_dtype` (None: the model's own), in chunks, as
    they do in serving: a quantized cache is written and read here too. About `keep_distributions`
    distributions are kept, as many of each window.

    Raises:
        ValueError: the text is shorter than one window, or a window than 2 tokens.
    """
    if window < 2 or len(token_ids) < window:
        raise ValueError(f"{len(token_ids)} tokens do not fill one window of {window}")
    num_windows = len(token_ids) // window
    kept = min(window - 1, -(-keep_distributions // num_windows))
    positions = torch.linspace(0, window - 2, kept).round().long()
    caches = text_caches(decoder, window, cache_dtype)
    nll = torch.empty((num_windows, window - 1))
    log_probs = torch.empty((num_windows, kept, decoder.spec.vocab_size))
    with torch.inference_mode():
        for index in range(num_windows):
            ids = torch.tensor(token_ids[index * window : (index + 1) * window])
            for start, rows in next_token_log_probs(decoder, caches, ids[:-1]):
                end = start + len(rows)
                targets = ids[start + 1 : end + 1].to(rows.device)
                nll[index, start:end] = -rows.gather(1, targets[:, None])[:, 0].cpu()
                here = (positions >= start) & (positions < end)
                chosen = (positions[here] - start).to(rows.device)
                log_probs[index, here] = rows[chosen].cpu()
    return TextScore(nll, log_probs)


def text_caches(
    decoder: Decoder, most_tokens: int, cache_dtype: torch.dtype | None = None
) -> list[LayerCache]:
    """The cache of each layer for a text of so many tokens; None takes the model's own dtype."""
    if cache_dtype is None:
        cache_dtype = decoder.dtype
    decoder.ranks.tell(
        "score", caches={"most_tokens": most_tokens, "dtype": str(cache_dtype).split(".")[1]}
    )
    spec = decoder.spec
    shape = (-(-most_tokens // _BLOCK_SIZE), spec.num_kv_heads, _BLOCK_SIZE, spec.head_dim)
    return [LayerCache.allocate(shape, cache_dtype, decoder.device) for _ in range(spec.num_layers)]


def next_token_log_probs(
    decoder: Decoder, caches: Sequence[LayerCache], ids: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """What follows each token of a text, ids int64 [T] that the caches have room for, by chunk.

    Yields (position of the chunk's first token, float32 [tokens of the chunk, vocabulary]). Called
    under `torch.inference_mode`.
    """
    for start in range(0, len(ids), _CHUNK_TOKENS):
        chunk = ids[start : start + _CHUNK_TOKENS]
        with decoder.ranks.lockstep():
            decoder.ranks.tell("score", chunk={"start": start, "token_ids": chunk.tolist()})
            logits = _chunk_logits(decoder, caches, chunk, start)
        yield start, logits.float().log_softmax(-1)


class TextFollower:
    """Does what the driver does here, as another of its ranks (`engine.parallel`)."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._caches: list[LayerCache] = []

    def obey(
        self, caches: dict[str, Any] | None = None, chunk: dict[str, Any] | None = None
    ) -> None:
        """Make caches for a text, which replace those of the one before, or compute a chunk."""
        if caches is not None:
            self._caches.clear()
            dtype = getattr(torch, caches["dtype"])
            self._caches = text_caches(self._decoder, caches["most_tokens"], dtype)
        if chunk is not None:
            ids = torch.tensor(chunk["token_ids"])
            with torch.inference_mode():
                _chunk_logits(self._decoder, self._caches, ids, chunk["start"])


def _chunk_logits(
    decoder: Decoder, caches: Sequence[LayerCache], ids: Tensor, start: int
) -> Tensor:
    """Logits of the tokens `ids` of a text, from position `start` on, all before in the caches."""
    blocks, device = list(range(caches[0].num_blocks)), decoder.device
    end = start + len(ids)
    metadata = build_attention_metadata([blocks], [len(ids)], [end], _BLOCK_SIZE, device)
    positions = torch.arange(start, end, device=device)
    hidden = decoder.forward(ids.to(device), positions, caches, [metadata] * len(caches))
    return decoder.logits(hidden)


def compare(model: TextScore, reference: TextScore, seed: int = 0) -> QualityLoss:
    """The loss of a model against its reference, both scored on the same text and windows."""
    difference = (model.nll.double() - reference.nll.double()).mean(dim=1)
    pairs = list(zip(reference.log_probs, model.log_probs, strict=True))
    # A window at a time: all distributions in float64 would take gigabytes.
    kl = np.stack([_divergence(p.double(), q.double()).numpy() for p, q in pairs])
    agree = np.stack([(p.argmax(-1) == q.argmax(-1)).double().numpy() for p, q in pairs])
    nats, nats_low, nats_high = mean_interval(difference.numpy())
    mean, mean_low, mean_high = mean_interval(kl.mean(axis=1))
    tail = bootstrap_interval(kl, lambda rows: np.quantile(rows, _TAIL, axis=1), seed)
    agreement = bootstrap_interval(agree, _mean_of_rows, seed)
    return QualityLoss(
        model.perplexity,
        reference.perplexity,
        *(_relative(nats), _relative(nats_low), _relative(nats_high)),
        *(mean, max(0.0, mean_low), mean_high),
        *tail,
        *agreement,
        windows=kl.shape[0],
        positions=kl.size,
    )


def _mean_of_rows(rows: Values) -> Values:
    means: Values = rows.mean(axis=1)
    return means


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats by row, from logarithms of probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _relative(nats: float) -> float:
    """exp(nats) - 1; infinite where it overflows, as with broken weights."""
    return float(torch.tensor(nats, dtype=torch.float64).expm1())
