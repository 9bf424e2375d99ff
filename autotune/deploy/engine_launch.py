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
    port: int | None = None,
    file: str | None = None,
) -> list[str]:
    """The whole command.

    Arguments:
        engine: the engine's table.
        translation: the configuration in its keys.
        host: address to listen on.
        port: port to listen on; by default the table's.
        file: path of the config file; without one every key becomes a flag of the command.
    """
    model = model_of(translation)
    values = {
        "{model}": model,
        "{name}": model.rstrip("/").rpartition("/")[2],
        "{host}": host,
        "{port}": str(engine.port if port is None else port),
    }
    flags = [
        word
        for key, value in translation.flags().items()
        for word in flag_words(engine, key, value)
    ]
    words: list[str] = []
    for word in engine.command:
        if word == "{file}" and file is not None:
            words.append(file)
        elif word == "{file}":
            words[-1:] = flags  # in place of the flag that names the file
        elif word == "{flags}":
            words += flags
        else:
            words.append(values.get(word, word))
    return words
