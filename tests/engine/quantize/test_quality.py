"""Quality against transformers' own loss, and the comparison against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotune.embedded import HELD_OUT, TARGET
from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
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
def token_ids() -> list[int]:
    model = loaded()
    assert model.tokenizer is not None
    return model.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:1000]


def test_likelihoods_equal_those_of_transformers(token_ids: list[int]) -> None:
    score = score_text(loaded().runner.decoder, token_ids, window=256, keep_distributions=300)
    assert score.nll.shape == (3, 255)
    assert score.log_probs.shape == (300, 4096)
    reference = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    windows = torch.tensor(token_ids[: 3 * 256]).view(3, 256)
    with torch.inference_mode():
        expected = reference(windows).logits[:, :-1].log_softmax(-1)
    nll = -expected.gather(2, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(score.nll, nll, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        score.log_probs.float(), expected.reshape(-1, 4096)[:300], atol=0.02, rtol=0
    )
    assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-3)


def test_int4_loses_more_than_int8_and_both_agree_mostly(token_ids: list[int]) -> None:
    scores = {
        q: score_text(loaded(q).runner.decoder, token_ids, 256, 256)
        for q in ("none", "int8", "int4")
    }
    int8, int4 = (compare(scores[q], scores["none"]) for q in ("int8", "int4"))
    assert 0 < int8.kl < int4.kl < 0.5
    assert int4.top1_agreement <= int8.top1_agreement <= 1.0
    assert int8.quality_loss_low <= int8.quality_loss <= int8.quality_loss_high
    same = compare(scores["none"], scores["none"])
    assert (same.quality_loss, same.kl, same.top1_agreement) == (0.0, 0.0, 1.0)


def test_comparison_by_definition() -> None:
    generator = torch.Generator().manual_seed(11)
    p, q = (torch.randn(40, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    nll_p, nll_q = (torch.rand(4, 10, generator=generator) for _ in range(2))
    reference = TextScore(nll_p, p.log_softmax(-1))
    model = TextScore(nll_q, q.log_softmax(-1))
    result = compare(model, reference)
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert result.kl == pytest.approx(float(expected))
    ratio = math.exp(float(nll_q.mean())) / math.exp(float(nll_p.mean()))
    assert result.quality_loss == pytest.approx(ratio - 1, rel=1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agree))


def test_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill one window"):
        score_text(loaded().runner.decoder, [1, 2, 3], 8, 0)
