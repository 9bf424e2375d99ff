"""The comments of an exported configuration: evidence, warnings, and what does not carry over."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translation import LeftOut, Translation
from autotune.deploy.yaml_text import comment, setting


def warnings(engine: ServingEngine, evidence: Evidence) -> tuple[str, ...]:
    """What a person should know before relying on the files."""
    title = engine.title
    told = [
        f"this was measured with autotune's bundled engine, not with {title}. The choice is where "
        f"to start from; a gain named below was not measured on {title}. Measure there before "
        "relying on it."
    ]
    if evidence.device not in engine.devices:
        told.append(
            f"this was measured on a CPU and {title} runs on GPUs only: batch sizes, step sizes "
            "and memory that suit a CPU say little of a GPU. Tune again there."
        )
    return tuple(told)


def heading(engine: ServingEngine, use: str, evidence: Evidence) -> list[str]:
    """Comment lines for the top of a file."""
    lines = comment(f"Configuration of {engine.title} {engine.version}. Use: {use}")
    how = "checked against" if engine.checked_by == "parser" else "read in the source of"
    lines += comment(f"The keys were {how} {engine.title} {' and '.join(engine.checked)}.")
    for warning in warnings(engine, evidence):
        lines += comment(f"WARNING: {warning}")
    for remark in engine.remarks:
        lines += comment(remark)
    lines.append("#")
    for line in evidence.summary:
        lines += comment(line, indent="  ")
    return lines


def key_notes(translation: Translation, evidence: Evidence) -> Mapping[str, tuple[str, ...]]:
    """The comments of each key."""
    notes: dict[str, list[str]] = {key: [why] for key, (_, why) in translation.always.items()}
    for entry in translation.entries:
        of_member = "" if entry.member is None else f"{entry.member}: "
        tuned = evidence.of_knob(entry.knob)
        told = [*([f"tuned: {tuned}"] if tuned else []), *entry.notes]
        notes.setdefault(entry.key, []).extend(of_member + note for note in told)
        for key, (_, note) in entry.beside.items():
            notes.setdefault(key, []).append(note or f"goes with {entry.key}")
    return {key: tuple(told) for key, told in notes.items()}


def environment_notes(translation: Translation) -> list[str]:
    """Comment lines on what a config file cannot hold and the engine's environment has to."""
    entries = [entry for entry in translation.entries if entry.place == "environment"]
    if not entries:
        return []
    lines = ["", *comment("To be set in the environment, as start.sh does:")]
    for entry in entries:
        why = "; ".join((f"for {entry.knob}", *entry.notes))
        lines += comment(f"- {entry.key}={entry.value} ({why})", indent="    ")
    return lines


def left_out(engine: ServingEngine, translation: Translation) -> list[str]:
    """Comment lines on every knob without a key."""
    title = engine.title
    return [
        *_list(
            f"Not carried over: these shaped what was measured and {title} has no such key.",
            translation.lost,
        ),
        *_list(f"Needing no key in {title}:", translation.unneeded),
    ]


def _list(heading_: str, knobs: tuple[LeftOut, ...]) -> list[str]:
    if not knobs:
        return []
    lines = ["", *comment(heading_)]
    for left in knobs:
        lines += comment(f"- {setting(left.knob, left.value)}: {left.reason}", indent="    ")
    return lines
