"""The files that start the tuned engine: its own configuration file and a script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.yaml_text import comment, setting
from autotune.external.engine import ExternalEngine
from autotune.external.flags import Flags, arguments_of, flags_of, idle_knobs
from autotune.external.table import Extras, Value
from autotune.external_search.served import longest_of, values_given
from autotune.external_search.space import FlagConfig
from autotune.records import RunFolder, write_atomically

SCRIPT = "serve.sh"
# Engines that read their flags from a YAML file, without the dashes.
READS_YAML = ("vllm", "sglang")


def write_external_deploy(
    folder: RunFolder, run: Mapping[str, Any], engine: ExternalEngine
) -> list[Path]:
    """Write what starts the winner into `deploy/`; returns the files.

    Args:
        folder: of the run.
        run: the content of `run.json`, its result included.
        engine: what was tuned.
    """
    config = FlagConfig(run["result"]["winner_config"])
    started, _ = values_given(engine, config, longest_of(folder))
    values = {**engine.fixed, **started}
    flags = flags_of(engine.table, values, engine.device)
    evidence = Evidence.from_run(run)
    name = engine.table.engine
    files: dict[str, str] = {}
    if name in READS_YAML:
        files[f"{name}.yaml"] = render_flags_yaml(engine, values, evidence)
    files[SCRIPT] = render_script(engine, flags, evidence, f"{name}.yaml" in files)
    written = []
    for file, text in files.items():
        path = folder.deploy / file
        write_atomically(path, text.encode())
        written.append(path)
    (folder.deploy / SCRIPT).chmod(0o755)
    return written


def render_flags_yaml(
    engine: ExternalEngine, values: Mapping[str, Value], evidence: Evidence
) -> str:
    """The engine's own configuration file, each tuned value with its evidence."""
    table = engine.table
    flags = flags_of(table, values, engine.device)
    idle = idle_knobs(table, values, engine.device)
    more = table.on_device.get(engine.device, Extras())
    # Flags alone: what follows one may be a key.
    words = [word.partition("=")[0] for word in (*more.arguments, *engine.extra_arguments)]
    left_out = [*(word for word in words if word.startswith("-")), *more.environment]
    comments: dict[str, list[str]] = {}
    settings: dict[str, Value] = {}
    for name, value in values.items():
        knob = table.knobs[name]
        if name in idle or value == knob.absent:
            continue
        alone = arguments_of(knob, value)
        if knob.member is not None and knob.flag is not None:
            key = knob.flag
            settings[key] = flags.arguments[flags.arguments.index(key) + 1]
        elif alone:
            key = alone[0]
            settings[key] = value if len(alone) > 1 else True
        else:
            if knob.environment is not None or knob.request_field is not None:
                left_out.append(name)
            continue
        if told := evidence.of_knob(name):
            comments.setdefault(key, []).extend(comment(f"tuned: {told}", indent="  "))
    lines = _heading(engine, evidence)
    for key, value in settings.items():
        lines += comments.get(key, [])
        lines.append(setting(key.lstrip("-"), value))
    if left_out:
        lines += ["", *comment(f"Not in this file, but in {SCRIPT}: {', '.join(left_out)}")]
    return "\n".join(lines) + "\n"


def render_script(engine: ExternalEngine, flags: Flags, evidence: Evidence, has_yaml: bool) -> str:
    """A script that starts the engine as it was measured, on the loopback interface."""
    table = engine.table
    lines = ["#!/usr/bin/env bash", *_heading(engine, evidence)]
    if flags.request_fields:
        fields = json.dumps(dict(flags.request_fields))
        lines += comment(f"Each request has to carry the fields {fields}.")
    lines += ["set -euo pipefail", ""]
    start = table.start(engine.device)
    for name, value in {**start.environment, **flags.environment}.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    if engine.restart_command:
        lines += comment("What restarted the server in the trials, with the winner's flags.")
        lines.append(" ".join(_restart(engine, flags)))
        return "\n".join(lines) + "\n"
    places = {
        "model": shlex.quote(engine.model),
        "host": '"${HOST:-127.0.0.1}"',
        "port": '"${PORT:-8000}"',
        "served_name": shlex.quote(engine.served_name),
    }
    words = [shlex.quote(word) for word in engine.program]
    words += [_filled(word, places) for word in start.arguments]
    words += [shlex.quote(word) for word in (*engine.extra_arguments, *flags.arguments)]
    lines += [f'exec {_wrapped(words)} "$@"']
    if has_yaml:
        lines += ["", *comment(f"Or: {table.program} … --config {table.engine}.yaml")]
    return "\n".join(lines) + "\n"


def _heading(engine: ExternalEngine, evidence: Evidence) -> list[str]:
    title = engine.table.title
    lines = comment(
        f"{title} {engine.version or '(version unknown)'}, tuned by autotune and measured on it."
    )
    if not engine.version_checked:
        checked = ", ".join(engine.table.version.checked)
        lines += comment(f"The flags' names were checked with {title} {checked}.")
    for line in evidence.summary:
        lines += comment(line, indent="  ")
    return lines


def _restart(engine: ExternalEngine, flags: Flags) -> Sequence[str]:
    from autotune.external.restart import restart_words

    return [shlex.quote(word) for word in restart_words(engine.restart_command, flags)]


def _filled(word: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        if word == f"{{{name}}}":
            return value
    return shlex.quote(word)


def _wrapped(words: Sequence[str]) -> str:
    """One flag a line."""
    text = words[0]
    for word in words[1:]:
        text += (" \\\n  " if word.startswith("-") else " ") + word
    return text
