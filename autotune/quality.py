"""The quality of a loaded model on the held-out text, against its unquantized self."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autotune.embedded import HELD_OUT
from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.quantize.quality import TextScore, compare, score_text

# Enough text for a relative change of perplexity of well under 1% to stand out. Models above
# FULL_TEXT_PARAMETERS read less, so that scoring stays short beside loading them.
TEXT_TOKENS = 8192
LEAST_TEXT_TOKENS = 1024
FULL_TEXT_PARAMETERS = 250_000_000
WINDOW_TOKENS = 512
# Whole distributions take vocabulary x 2 bytes a position.
KEPT_DISTRIBUTIONS = 512


class QualityMeter:
    """Measures the quality of loaded models of one checkpoint, each configuration once.

    Args:
        folder: where the reference's score is kept between processes.
    """

    def __init__(self, folder: Path) -> None:
        self._reference_file = folder / "quality_reference.safetensors"
        self._known: dict[tuple[str, str], dict[str, Any] | None] = {}

    def measure(self, loaded: LoadedModel, config: EngineConfig) -> dict[str, Any] | None:
        """`QualityLoss` as a dict; None if the model has no tokenizer to read the text with.

        The unquantized model is loaded beside the given one if it has not been scored before.
        """
        key = (config.quantization, config.dtype)
        if key not in self._known:
            self._known[key] = self._measure(loaded, config)
        return self._known[key]

    def _measure(self, loaded: LoadedModel, config: EngineConfig) -> dict[str, Any] | None:
        score = _score(loaded)
        if score is None:
            return None
        if config.quantization == "none":
            save_file({"nll": score.nll, "log_probs": score.log_probs}, self._reference_file)
            return dataclasses.asdict(compare(score, score))
        reference = self._read_reference()
        if reference is None:
            reference = _score(load_model(config.replace(quantization="none")))
            assert reference is not None
            save_file(
                {"nll": reference.nll, "log_probs": reference.log_probs}, self._reference_file
            )
        return dataclasses.asdict(compare(score, reference))

    def _read_reference(self) -> TextScore | None:
        try:
            tensors = load_file(self._reference_file)
            return TextScore(tensors["nll"], tensors["log_probs"])
        except (OSError, SafetensorError, KeyError):
            return None


def _score(loaded: LoadedModel) -> TextScore | None:
    if loaded.tokenizer is None:
        return None
    wanted = TEXT_TOKENS * FULL_TEXT_PARAMETERS // max(1, loaded.spec.num_parameters)
    most = max(LEAST_TEXT_TOKENS, min(TEXT_TOKENS, wanted))
    token_ids = loaded.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:most]
    window = min(WINDOW_TOKENS, loaded.runner.max_model_len, len(token_ids))
    return score_text(loaded.runner.decoder, token_ids, window, KEPT_DISTRIBUTIONS)
