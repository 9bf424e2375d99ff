"""How an engine is started with a translated configuration: its command, word by word."""

from __future__ import annotations

import json
from typing import Any

from autotune.deploy.serving_engine import ServingEngine
from autotune.deploy.translation import Translation


def flag_words(engine: ServingEngine, key: str, value: Any) -> list[str]:
    """One key as words of a command line.

    A switch that is off has no words. Nested values become JSON.
    """
    flag = f"--{key}"
    if isinstance(value, bool):
        if engine.flags == "value":
            return [flag, str(value).lower()]
        return [flag] if value else []
    return [flag, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]


def model_of(translation: Translation) -> str:
    """What the engine loads."""
    entry = translation.entry("model")
    return "" if entry is None else str(entry.value)


def launch_words(
    engine: ServingEngine,
    translation: Translation,
    *,
    host: str = "127.0.0.1",
    port: int | str | None = None,
    file: str | None = None,
    model: str | None = None,
) -> list[str]:
    """The whole command.

    Arguments:
        engine: the engine's table.
        translation: the configuration in its keys.
        host: address to listen on.
        port: port to listen on; by default the table's.
        file: path of the config file; without one every key becomes a flag of the command.
        model: what to load in place of the measured model.
    """
    flags = dict(translation.flags())
    entry = translation.entry("model")
    if model is not None and entry is not None and entry.place == "setting":
        flags[entry.key] = model
    as_flags = [word for key, value in flags.items() for word in flag_words(engine, key, value)]
    values = {
        "model": model or model_of(translation),
        "name": (model or model_of(translation)).rstrip("/").rpartition("/")[2],
        "host": host,
        "port": str(engine.port if port is None else port),
        "file": file or "",
    }
    return _fill(engine.command, values, as_flags, drop_file=file is None)


def prepare_words(
    engine: ServingEngine, translation: Translation, *, model: str | None = None
) -> list[str]:
    """The command that has to run once before, or nothing."""
    flags = translation.flags()
    as_flags = [word for key, value in flags.items() for word in flag_words(engine, key, value)]
    return _fill(engine.prepare, {"model": model or model_of(translation)}, as_flags)


def _fill(
    words: tuple[str, ...], values: dict[str, str], flags: list[str], *, drop_file: bool = False
) -> list[str]:
    """The words with what they stand for; without a file, the flags in its place."""
    filled: list[str] = []
    for word in words:
        if word == "{flags}":
            filled += flags
        elif word == "{file}" and drop_file:
            filled.pop()  # the flag that names the file
            filled += flags
        elif word.startswith("{"):
            filled.append(values[word[1:-1]])
        else:
            filled.append(word)
    return filled
