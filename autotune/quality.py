"""The quality of a loaded model on the held-out text, against its unquantized self.

The reference has the checkpoint's own weights (of a checkpoint that is quantized already, those)
and a KV cache in the model's dtype. A configuration is scored with the cache that it serves with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autotune.embedded import HELD_OUT
from autotune.errors import BadInput
from autotune.slo import Slo
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.kv_cache import cache_dtype, kv_bytes_per_token
from engine.loading import LoadedModel, load_model
from engine.quantize.quality import TextScore, compare, score_text
from engine.tokenizer import has_tokenizer

# Enough text for a relative change of perplexity of well under 1% to stand out. Models above
# FULL_TEXT_PARAMETERS read less, so that scoring stays short beside loading them.
TEXT_TOKENS = 49_152
LEAST_TEXT_TOKENS = 2048
FULL_TEXT_PARAMETERS = 40_000_000
WINDOW_TOKENS = 256
# Whole distributions take vocabulary x 4 bytes a position, of the model and of its reference.
KEPT_DISTRIBUTIONS = 4096
KEPT_BYTES = 256 << 20
_REFERENCE_FILE = "quality_reference.safetensors"


class QualityMeter:
    """Measures the quality of loaded models of one checkpoint, each configuration once.

    Args:
        folder: where the reference's score is kept between processes.
    """

    def __init__(self, folder: Path) -> None:
        self._reference_file = folder / _REFERENCE_FILE
        self._known: dict[tuple[str, str, str], dict[str, Any] | None] = {}
        self._reference: TextScore | None = None

    def measure(
        self, loaded: LoadedModel, config: EngineConfig, *, load_reference: bool = True
    ) -> dict[str, Any] | None:
        """`QualityLoss` as a dict, None for what is not finite; with what it is the quality of.

        That is `variant` (as people call it), `quantization`, `kv_cache_dtype`, the `weight_bytes`
        held and `kv_bytes_per_token`.

        None if the model has no tokenizer to read the text with, or there is no reference. The
        unquantized model, if it has not been scored before, is loaded beside the given one with
        `load_reference`; where it does not fit beside it, there is no reference.
        """
        key = (config.quantization, config.dtype, config.kv_cache_dtype)
        if key in self._known:
            return self._known[key]
        score = score_held_out(loaded, config)
        reference = score
        if score is not None and is_reference(config):
            self._keep(score)
        elif score is not None:
            reference = self._read_reference()
            if reference is None and load_reference:
                reference = self._load_reference(config)
            if reference is None:
                return None  # not remembered: a later trial may bring the reference
        loss = loss_against(score, reference)
        self._known[key] = None if loss is None else {**_identity(loaded, config), **loss}
        return self._known[key]

    def _load_reference(self, config: EngineConfig) -> TextScore | None:
        try:
            plain = reference_config(config)
            with contextlib.closing(load_model(plain)) as loaded:
                reference = score_held_out(loaded, plain)
        except (EnvironmentLacks, MemoryError):
            return None
        if reference is not None:
            self._keep(reference)
        return reference

    def _keep(self, reference: TextScore) -> None:
        self._reference = reference
        # The file is for the next process; without it that one scores the reference again.
        with contextlib.suppress(OSError, SafetensorError):
            save_file(
                {"nll": reference.nll, "log_probs": reference.log_probs}, self._reference_file
            )

    def _read_reference(self) -> TextScore | None:
        if self._reference is None:
            with contextlib.suppress(OSError, SafetensorError, KeyError):
                tensors = load_file(self._reference_file)
                self._reference = TextScore(tensors["nll"], tensors["log_probs"])
        return self._reference


def check_measurable(slo: Slo, config: EngineConfig) -> None:
    """Refuse limits on the quality of a model that cannot read the held-out text.

    Raises:
        BadInput: the SLO limits the quality and the model has no tokenizer.
    """
    folder = config.tokenizer or config.model
    if slo.needs_quality and not has_tokenizer(folder):
        raise BadInput(
            f"--slo {slo} limits the quality, which is measured on a text, and {folder} holds no "
            "tokenizer to read it with: add --tokenizer, or leave that limit out"
        )


def loss_against(score: TextScore | None, reference: TextScore | None) -> dict[str, Any] | None:
    """The entries of `QualityLoss`, None for what is not finite; None where a score is missing."""
    if score is None or reference is None:
        return None
    values = dataclasses.asdict(compare(score, reference))
    # Broken weights score NaN or infinity, which no record can hold; None is a missed limit.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def reference_config(config: EngineConfig) -> EngineConfig:
    """The same config without quantization, against which its quality is measured."""
    return config.replace(quantization="none", kv_cache_dtype="auto")


def is_reference(config: EngineConfig) -> bool:
    """Whether a config quantizes nothing."""
    return config.quantization == "none" and config.kv_cache_dtype == "auto"


def variant_name(config: EngineConfig) -> str:
    """What a config quantizes, as people would say it: `awq`, `int8 + fp8 cache`, `none`."""
    if config.kv_cache_dtype == "auto":
        return config.quantization
    cache = f"{config.kv_cache_dtype} cache"
    return cache if config.quantization == "none" else f"{config.quantization} + {cache}"


def forget_reference(folder: Path) -> None:
    """Remove the reference's score, which is large and of no use once a run has ended."""
    with contextlib.suppress(OSError):
        (folder / _REFERENCE_FILE).unlink(missing_ok=True)


def _identity(loaded: LoadedModel, config: EngineConfig) -> dict[str, Any]:
    return {
        "variant": variant_name(config),
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "weight_bytes": loaded.runner.decoder.nbytes,
        "kv_bytes_per_token": kv_bytes_per_token(
            loaded.spec, cache_dtype(config, loaded.runner.decoder.dtype)
        ),
    }


def score_held_out(loaded: LoadedModel, config: EngineConfig) -> TextScore | None:
    """How a model predicts the held-out text; None if it has no tokenizer to read it with."""
    if loaded.tokenizer is None:
        return None
    wanted = TEXT_TOKENS * FULL_TEXT_PARAMETERS // max(1, loaded.spec.num_parameters)
    most = max(LEAST_TEXT_TOKENS, min(TEXT_TOKENS, wanted))
    token_ids = loaded.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:most]
    window = min(WINDOW_TOKENS, loaded.runner.max_model_len, len(token_ids))
    kept = min(KEPT_DISTRIBUTIONS, KEPT_BYTES // (4 * loaded.spec.vocab_size))
    return score_text(
        loaded.runner.decoder,
        token_ids,
        window,
        kept,
        cache_dtype(config, loaded.runner.decoder.dtype),
    )
