"""The text that calibrated quantization reads: the workload's own prompts, where it has texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autotune.records import write_atomically
from engine.config import EngineConfig

# Some five thousand tokens; with less, the engine's built-in sample tells more of a model.
LEAST_CHARACTERS = 20_000
# Far more than calibration reads; it takes windows from all of it.
MOST_CHARACTERS = 1_000_000
NAME = "calibration.txt"


def write_calibration_text(folder: Path, texts: Sequence[str]) -> Path | None:
    """Put the prompts into the run folder, and return where; None if there is too little of them.

    Where there are very many, evenly spread ones are taken.
    """
    length = sum(len(text) for text in texts)
    if length < LEAST_CHARACTERS:
        return None
    stride = -(-length // MOST_CHARACTERS)
    path = folder / NAME
    content = "\n\n".join(texts[::stride])[: 2 * MOST_CHARACTERS]
    # Lone surrogates, which JSON strings may hold, have no UTF-8.
    write_atomically(path, content.encode("utf-8", "replace"))
    return path.resolve()


def with_text_at_hand(config: EngineConfig, folder: Path) -> EngineConfig:
    """The same config, reading the run folder's text where that lies now.

    Configs name the text by its path of the time when the run began; the folder may have been moved
    since.
    """
    named = None if config.calibration is None else Path(config.calibration).expanduser()
    here = folder / NAME
    if named is None or named.name != NAME or named.exists() or not here.exists():
        return config
    return config.replace(calibration=str(here.resolve()))
