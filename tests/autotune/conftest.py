from __future__ import annotations

import pytest

from autotune.search import prepare
from autotune.search import tune as module
from autotune.search.methods_offered import Offer
from engine.config import KNOBS
from tests.autotune.played import PlayedEvaluator, play_nothing


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedEvaluator]:
    monkeypatch.setattr(PlayedEvaluator, "play", staticmethod(play_nothing))
    monkeypatch.setattr(PlayedEvaluator, "kl", {})
    # Whatever this machine runs fast, the played one runs all of the table.
    everything = {name: KNOBS[name].choices or () for name in ("quantization", "kv_cache_dtype")}
    monkeypatch.setattr(prepare, "offer_for", lambda _, quantized: Offer(everything, quantized))
    monkeypatch.setattr(module, "Evaluator", PlayedEvaluator)
    return PlayedEvaluator
