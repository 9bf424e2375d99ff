from __future__ import annotations

import pytest

from autotune.search import tune as module
from tests.autotune.played import PlayedEvaluator, play_nothing


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedEvaluator]:
    monkeypatch.setattr(PlayedEvaluator, "play", staticmethod(play_nothing))
    monkeypatch.setattr(module, "Evaluator", PlayedEvaluator)
    return PlayedEvaluator
