"""Which smaller model or heads go with a served model, where its user names none.

The engine takes a folder and asks no questions; what belongs to what is known here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.embedded import DRAFT, TARGET
from engine.config import KNOBS, MODEL_METHODS, EngineConfig

if TYPE_CHECKING:
    from engine.models.spec import DecoderSpec


def with_speculative_model(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs with the folder that their speculative method needs, if none is named and one is known.

    They need not be valid otherwise.
    """
    method = knobs.get("speculative_method")
    if method not in MODEL_METHODS or knobs.get("speculative_model") is not None:
        return dict(knobs)
    folder = speculative_models(str(knobs.get("model") or ""), None).get(method)
    return dict(knobs) if folder is None else {**knobs, "speculative_model": folder}


def folder_for(method: str, config: EngineConfig) -> str | None:
    """The folder that a speculative method would use with a config's model; None: none is known."""
    if method == config.speculative_method:
        return config.speculative_model
    return speculative_models(config.model, config.speculative_model).get(method)


def methods_with_models(config: EngineConfig) -> tuple[str, ...]:
    """The speculative methods that can be chosen with a config's model, `none` among them."""
    methods = KNOBS["speculative_method"].choices or ()
    return tuple(
        method
        for method in methods
        if method not in MODEL_METHODS or folder_for(method, config) is not None
    )


def check_speculative_models(
    config: EngineConfig, methods: Collection[str], spec: DecoderSpec
) -> None:
    """Check that what some speculative methods would draft with fits a config's model, of `spec`.

    Raises:
        engine.errors.ConfigError: a smaller model of another vocabulary.
        engine.errors.ModelError: a folder that is missing or broken, or heads of another model.
    """
    # What reads weights takes long to import.
    from engine.checkpoints.model_folder import open_model_folder
    from engine.models.registry import decoder_spec
    from engine.speculate.load_draft import check_same_vocabulary
    from engine.speculate.medusa_checkpoint import read_medusa

    for method in MODEL_METHODS:
        path = folder_for(method, config) if method in methods else None
        if path is not None and method == "medusa":
            read_medusa(path, spec, config.model)
        elif path is not None:
            draft, model = open_model_folder(path), open_model_folder(config.model)
            check_same_vocabulary(draft, decoder_spec(draft), model, spec)


@functools.cache
def speculative_models(model: str, given: str | None) -> Mapping[str, str]:
    """Folders by speculative method: the one that is given, and those known for the model.

    A given folder holds heads if its files say so, and is taken for a smaller model otherwise: the
    engine then says what is wrong with it. No `model` is the embedded one.
    """
    known: dict[str, str] = {}
    if not model or Path(model).expanduser().resolve() == TARGET.resolve():
        known["draft_model"] = str(DRAFT.resolve())
    if given is not None:
        known["medusa" if _holds_heads(Path(given).expanduser()) else "draft_model"] = given
    return known


def _holds_heads(folder: Path) -> bool:
    if any(folder.glob("medusa_lm_head.*")):
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and (
        "medusa_num_heads" in config or config.get("model_type") == "medusa"
    )
