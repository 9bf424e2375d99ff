"""The text that calibration reads, and the windows of tokens that are taken from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.quantize.calibrate import cut_windows

SAMPLE = Path(__file__).with_name("calibration_sample.txt")
# Longer windows cost attention and tell linear layers nothing new.
WINDOW_TOKENS = 512


def read_calibration_text(path: str | Path | None) -> str:
    """The text of a file; of the built-in sample (documentation of Python, English) with None.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, or empty.
    """
    file = SAMPLE if path is None else Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"calibration text {file} cannot be read: {error.strerror or error}; give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"calibration text {file} is not UTF-8 text: byte {error.start} is invalid"
        ) from error
    if not text.strip():
        raise ConfigError(f"calibration text {file} is empty: give a file with text")
    return text


def choose_windows(token_ids: list[int], most_tokens: int, longest: int, seed: int) -> Tensor:
    """Windows int64 [W, L] of a text's tokens, in its order; at most `most_tokens` together.

    Where the text has more, a generator with `seed` picks. L is 512, less for a model whose
    sequences end earlier (`longest`) and for a text or a budget that is shorter.

    Raises:
        ConfigError: the text has fewer than 2 tokens.
    """
    length = min(WINDOW_TOKENS, longest, most_tokens, len(token_ids))
    if length < 2:
        raise ConfigError(
            f"the calibration text has {len(token_ids)} tokens: it must have at least 2, and "
            "should have thousands"
        )
    windows = cut_windows(token_ids, length)
    most = max(1, most_tokens // length)
    if len(windows) <= most:
        return windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:most]
    return windows[chosen.sort().values]
