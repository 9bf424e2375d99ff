"""Another serving engine's configuration file, with what carries over and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translate import LeftOut, translate
from autotune.deploy.yaml_text import comment, setting
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
    title = engine.title
    lines = comment(f"Configuration of {title} {engine.version}. Use: {engine.command}")
    lines += comment(f"The keys were checked against {title} {' and '.join(engine.checked)}.")
    lines += comment(
        f"WARNING: this was measured with autotune's bundled engine, not with {title}. The choice "
        f"is where to start from; a gain named below was not measured on {title}. Measure there "
        "before relying on it."
    )
    lines.append("#")
    for line in evidence.summary:
        lines += comment(line, indent="  ")
    lines.append("")
    for key, value in translation.settings().items():
        for entry in (entry for entry in translation.entries if entry.key == key):
            of_member = "" if entry.member is None else f"{entry.member}: "
            tuned = evidence.of_knob(entry.knob)
            for note in (*([f"tuned: {tuned}"] if tuned else []), *entry.notes):
                lines += comment(of_member + note, indent="  ")
        lines.append(setting(key, value))
    lines += _left_out(
        f"Not carried over: these shaped what was measured and {title} has no such key.",
        translation.lost,
    )
    lines += _left_out(f"Needing no key in {title}:", translation.unneeded)
    return "\n".join(lines) + "\n"


def _left_out(heading: str, knobs: tuple[LeftOut, ...]) -> list[str]:
    if not knobs:
        return []
    lines = ["", *comment(heading)]
    for left in knobs:
        lines += comment(f"- {setting(left.knob, left.value)}: {left.reason}", indent="    ")
    return lines
