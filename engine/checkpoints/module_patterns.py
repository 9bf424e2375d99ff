"""Regular expressions that a checkpoint's config uses to name layers.

They come with the file, so they are not trusted: one that could take for ever is refused.
"""

from __future__ import annotations

import re
import warnings

from engine.errors import ModelError

_MAX_LENGTH = 1000
_MAX_UNBOUNDED = 6
# A repeated group with a repetition inside ("(a+)+") can backtrack exponentially.
_NESTED = re.compile(r"[*+}][^()]*\)\s*[*+{]")


def compile_pattern(pattern: str, source: str) -> re.Pattern[str]:
    """A pattern that matches names in reasonable time; `source` says where it stands.

    Raises:
        ModelError: not a regular expression, or too long or too repetitive.
    """
    shown = pattern if len(pattern) <= 80 else pattern[:80] + "…"
    repeats = len(re.findall(r"[*+]|,\}", pattern))
    if len(pattern) > _MAX_LENGTH or repeats > _MAX_UNBOUNDED or _NESTED.search(pattern):
        raise ModelError(
            f"{source}: the pattern {shown!r} is too long or repeats within repetitions; at most "
            f"{_MAX_LENGTH} characters and {_MAX_UNBOUNDED} plain repetitions are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{source}: {shown!r} is not a regular expression: {error}") from error
