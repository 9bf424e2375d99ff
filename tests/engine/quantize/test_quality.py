"""Quality against transformers' own loss, and the comparison against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotune.embedded import HELD_OUT, TARGET
from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.quantize import quality as module
from engine.quantize.quality import TextScore, compare, score_text


def loaded(quantization: str = "none") -> LoadedModel:
    return load_model(
        EngineConfig(
            model=str(TARGET),
            dtype="float32",
            quantization=quantization,
            kv_cache_memory_bytes=1 << 24,
        )
    )


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded()


@pytest.fixture(scope="module")
def token_ids(model: LoadedModel) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:1000]


def test_likelihoods_equal_those_of_transformers(model: LoadedModel, token_ids: list[int]) -> None:
    score = score_text(model.runner.decoder, token_ids, window=256, keep_distributions=300)
    assert score.nll.shape == (3, 255)
    assert score.log_probs.shape == (3, 100, 4096)
    reference = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    windows = torch.tensor(token_ids[: 3 * 256]).view(3, 256)
    with torch.inference_mode():
        expected = reference(windows).logits[:, :-1].log_softmax(-1)
    nll = -expected.gather(2, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(score.nll, nll, atol=2e-3, rtol=0)
    # Kept positions lie evenly over the window, both ends among them.
    at = [round(i * 254 / 99) for i in range(100)]
    torch.testing.assert_close(score.log_probs, expected[:, at], atol=0.02, rtol=0)
    assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-3)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_what_is_scored_does_not_depend_on_the_chunks(
    model: LoadedModel,
    token_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: torch.dtype | None,
) -> None:
    scores = []
    for chunk in (37, 512):
        monkeypatch.setattr(module, "_CHUNK_TOKENS", chunk)
        scores.append(score_text(model.runner.decoder, token_ids, 256, 12, cache_dtype))
    # Rounding may fall to the other side of a step of the cache where a sum differs in its last
    # bit, so single positions may differ by what such a step is worth.
    torch.testing.assert_close(scores[0].nll, scores[1].nll, atol=0.02, rtol=0)
    torch.testing.assert_close(scores[0].nll.mean(), scores[1].nll.mean(), atol=3e-4, rtol=0)


def test_a_quantized_cache_is_part_of_the_score(model: LoadedModel, token_ids: list[int]) -> None:
    decoder = model.runner.decoder
    plain = score_text(decoder, token_ids, 256, 600)
    int8, fp8 = (
        compare(score_text(decoder, token_ids, 256, 600, dtype), plain)
        for dtype in (torch.int8, torch.float8_e4m3fn)
    )
    assert 0 < int8.kl < fp8.kl < 0.05  # 8 bits of a shared scale are finer than 4 of a mantissa


def test_int4_loses_more_than_int8_and_both_agree_mostly(
    model: LoadedModel, token_ids: list[int]
) -> None:
    plain = score_text(model.runner.decoder, token_ids, 256, 256)
    int8, int4 = (
        compare(score_text(loaded(q).runner.decoder, token_ids, 256, 256), plain)
        for q in ("int8", "int4")
    )
    assert 0 < int8.kl < int4.kl < 0.5
    assert int4.top1_agreement <= int8.top1_agreement <= 1.0
    same = compare(plain, plain)
    assert (same.quality_loss, same.kl, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert (same.windows, same.positions) == (3, 258)


def random_scores(seed: int, windows: int, kept: int) -> tuple[TextScore, TextScore]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, windows, kept, 7, generator=generator, dtype=torch.float64)
    nll = torch.rand(2, windows, 10, generator=generator)
    first, second = (TextScore(n, x.log_softmax(-1)) for n, x in zip(nll, noise, strict=True))
    return first, second


def test_comparison_by_definition() -> None:
    reference, model = random_scores(11, windows=4, kept=10)
    result = compare(model, reference)
    p, q = (score.log_probs.reshape(40, 7) for score in (reference, model))
    each = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result.kl == pytest.approx(float(each.mean()))
    assert result.kl_p99 == pytest.approx(float(each.quantile(0.99)))
    ratio = math.exp(float(model.nll.mean())) / math.exp(float(reference.nll.mean()))
    assert result.quality_loss == pytest.approx(ratio - 1, rel=1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agree))
    for name in ("quality_loss", "kl", "kl_p99", "top1_agreement"):
        low, value, high = (getattr(result, name + end) for end in ("_low", "", "_high"))
        assert low <= value <= high, name
        assert low < high, name


def test_intervals_are_the_same_every_time() -> None:
    reference, model = random_scores(5, windows=6, kept=4)
    assert compare(model, reference) == compare(model, reference)
    assert compare(model, reference, seed=1).kl_p99_low != compare(model, reference).kl_p99_low


def test_small_divergences_survive_what_is_kept() -> None:
    """Logits off by a hundredth: a divergence of about 5e-5, which half precision would lose."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(8, 32, 4096, generator=generator, dtype=torch.float64)
    other = logits + 0.01 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert 1e-5 < float(exact.mean()) < 1e-4
    nll = torch.zeros(8, 4)
    kept = compare(TextScore(nll, q.float()), TextScore(nll, p.float()))
    assert kept.kl == pytest.approx(float(exact.mean()), rel=0.01)
    assert kept.kl_p99 == pytest.approx(float(exact.quantile(0.99)), rel=0.01)
    half = compare(TextScore(nll, q.half()), TextScore(nll, p.half()))
    assert half.kl_p99 != pytest.approx(float(exact.quantile(0.99)), rel=0.01)


def test_short_text_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="do not fill one window"):
        score_text(model.runner.decoder, [1, 2, 3], 8, 0)
