"""Regular expressions that a checkpoint's config uses to name layers.

They come with the file, so they are not trusted: one that could take for ever is refused.
"""

from __future__ import annotations

import re
import warnings

from engine.errors import ModelError

_MAX_LENGTH = 1000
# Matching a name of n characters takes up to n**repetitions steps, and twice that per option.
_MAX_REPETITIONS = 5
_MAX_OPTIONS = 4
# A repeated group can backtrack exponentially, whatever is in it; verbose patterns, "(?x)",
# may have spaces and comments in between.
_REPEATED_GROUP = re.compile(r"\)(?:\s|#[^\n]*\n)*[*+{]")


def compile_pattern(pattern: str, source: str) -> re.Pattern[str]:
    """A pattern that matches names in reasonable time; `source` says where it stands.

    Raises:
        ModelError: not a regular expression, or one that could take too long.
    """
    shown = pattern if len(pattern) <= 80 else pattern[:80] + "…"
    repetitions = len(re.findall(r"[*+{]", pattern))
    options = len(re.findall(r"(?<!\()\?", pattern))
    if (
        len(pattern) > _MAX_LENGTH
        or repetitions > _MAX_REPETITIONS
        or options > _MAX_OPTIONS
        or _REPEATED_GROUP.search(pattern)
    ):
        raise ModelError(
            f"{source}: the pattern {shown!r} could take too long to match: at most {_MAX_LENGTH} "
            f"characters, {_MAX_REPETITIONS} repetitions, {_MAX_OPTIONS} options and no repeated "
            "group are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{source}: {shown!r} is not a regular expression: {error}") from error
