"""The comments of an exported configuration: evidence, warnings, and what does not carry over."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translation import Entry, LeftOut, Translation
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
        told = [*_tuned(entry, evidence), *entry.notes]
        notes.setdefault(entry.key, []).extend(of_member + note for note in told)
        for key, (_, note) in entry.beside.items():
            notes.setdefault(key, []).append(note or f"goes with {entry.key}")
    return {key: tuple(told) for key, told in notes.items()}


def _tuned(entry: Entry, evidence: Evidence) -> list[str]:
    """The evidence of the knob that a key came from, and of those whose meaning it carries."""
    told = [f"tuned: {own}"] if (own := evidence.of_knob(entry.knob)) else []
    carried = ((knob, evidence.of_knob(knob)) for knob in entry.carries)
    return told + [f"tuned, as {knob}: {line}" for knob, line in carried if line]


def environment_notes(translation: Translation, evidence: Evidence) -> list[str]:
    """Comment lines on what a config file cannot hold and the engine's environment has to."""
    entries = [entry for entry in translation.entries if entry.place == "environment"]
    if not entries:
        return []
    lines = ["", *comment("To be set in the environment, as start.sh of `autotune export` does:")]
    for entry in entries:
        why = "; ".join((f"for {entry.knob}", *_tuned(entry, evidence), *entry.notes))
        lines += comment(f"- {entry.key}={entry.value} ({why})", indent="    ")
    return lines


def left_out(engine: ServingEngine, translation: Translation, evidence: Evidence) -> list[str]:
    """Comment lines on every knob without a key."""
    title = engine.title
    return [
        *_list(
            f"Not carried over: these shaped what was measured and {title} has no such key.",
            translation.lost,
            evidence,
        ),
        *_list(f"Needing no key in {title}:", translation.unneeded, evidence),
    ]


def why_left_out(left: LeftOut, evidence: Evidence) -> str:
    """One knob without a key, its value, the reason, and the evidence if it was tuned."""
    tuned = evidence.of_knob(left.knob)
    return f"- {setting(left.knob, left.value)}: {left.reason}" + (
        f" (tuned: {tuned})" if tuned else ""
    )


def _list(heading_: str, knobs: tuple[LeftOut, ...], evidence: Evidence) -> list[str]:
    if not knobs:
        return []
    lines = ["", *comment(heading_)]
    for left in knobs:
        lines += comment(why_left_out(left, evidence), indent="    ")
    return lines
