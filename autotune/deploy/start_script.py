"""`start.sh`: starts another engine with the configuration, as its config file or as flags."""

from __future__ import annotations

import shlex

from autotune.deploy.engine_launch import flag_words, model_of
from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translation import Translation
from autotune.deploy.translation_notes import heading, key_notes, left_out
from autotune.deploy.yaml_text import comment

# What a person may set from outside; the rest of a word is quoted.
_OUTSIDE = {
    "{host}": '"${HOST:-127.0.0.1}"',
    "{port}": '"${PORT:-%d}"',
    "{flags}": '"${flags[@]}"',
    "{file}": '"$here/%s"',
    "{model}": '"$model"',
    "{name}": '"${model##*/}"',
}


def render_start_script(engine: ServingEngine, translation: Translation, evidence: Evidence) -> str:
    """A bash script; options that are given to it go on to the engine, where the last one counts.

    Where the engine reads a config file, the script only names it. Elsewhere the script is the
    configuration, with the evidence in comments.
    """
    lines = ["#!/usr/bin/env bash"]
    notes = key_notes(translation, evidence)
    if engine.file is None:
        lines += heading(engine, f"bash {engine.start_script}", evidence)
    else:
        lines += comment(
            f"Starts {engine.title} {engine.version} with {engine.file}, where all else is told."
        )
    words = (*engine.prepare, *engine.command)
    may = "HOST, PORT and MODEL" if "{model}" in words else "HOST and PORT"
    lines += comment(f"{may} may be set; further options go to the engine.")
    lines.append("set -euo pipefail")
    if engine.file is not None:
        lines.append('here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)')
    if "{model}" in words:
        lines.append(f"model=${{MODEL:-{shlex.quote(model_of(translation))}}}")
    for variable, text in translation.environment().items():
        lines += _comments(notes.get(variable, ()), "")
        lines.append(f"export {variable}={shlex.quote(text)}")
    if "{flags}" in words:
        lines.append("flags=(")
        for key, value in translation.flags().items():
            if flag := flag_words(engine, key, value):
                lines += _comments(notes.get(key, ()), "  ")
                lines.append(f"  {shlex.join(flag)}")
        lines.append(")")
    if engine.prepare:
        lines.append(_command(engine, engine.prepare))
    lines.append(f'exec {_command(engine, engine.command)} "$@"')
    if engine.file is None:
        lines += left_out(engine, translation, evidence)
    return "\n".join(lines) + "\n"


def _command(engine: ServingEngine, words: tuple[str, ...]) -> str:
    outside = {
        **_OUTSIDE,
        "{port}": _OUTSIDE["{port}"] % engine.port,
        "{file}": _OUTSIDE["{file}"] % engine.file,
    }
    return " ".join(outside.get(word) or shlex.quote(word) for word in words)


def _comments(notes: tuple[str, ...], indent: str) -> list[str]:
    return [indent + line for note in notes for line in comment(note, indent="  ")]
