"""Another serving engine's configuration file, with what carries over and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translate import translate
from autotune.deploy.translation_notes import environment_notes, heading, key_notes, left_out
from autotune.deploy.yaml_document import document, noted
from engine.config import EngineConfig


def render_serving_yaml(
    engine: ServingEngine,
    config: EngineConfig,
    evidence: Evidence,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """The file's text.

    Arguments:
        engine: the table of the engine that is to read the file.
        config: what was measured.
        evidence: what was measured of it.
        measured: what unset knobs came to; see `translate`.
    """
    translation = translate(config, engine, evidence.device, measured)
    notes = key_notes(translation, evidence)
    use = " ".join(_use(engine))
    content = _with_notes(translation.settings(), notes, "")
    lines = [*heading(engine, use, evidence), "", document(content).rstrip("\n")]
    lines += environment_notes(translation, evidence)
    lines += left_out(engine, translation, evidence)
    return "\n".join(lines) + "\n"


def _use(engine: ServingEngine) -> list[str]:
    """The command as far as the file is concerned."""
    words = [
        word.replace("{file}", engine.file or "").replace("{model}", "MODEL")
        for word in engine.command
    ]
    first = next(
        (i for i, word in enumerate(words) if word in ("{host}", "{port}")), len(words) + 1
    )
    return words[: first - 1]


def _with_notes(
    settings: Mapping[str, Any], notes: Mapping[str, tuple[str, ...]], path: str
) -> dict[str, Any]:
    return {
        key: noted(
            _with_notes(value, notes, f"{path}{key}.") if isinstance(value, dict) else value,
            *notes.get(f"{path}{key}", ()),
        )
        for key, value in settings.items()
    }
