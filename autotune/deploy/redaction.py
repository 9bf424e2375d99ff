"""Keys and tokens that a person typed stay out of what is written."""

from __future__ import annotations

import re

# `--api-key X`, `--hf-token=X`, `HF_TOKEN='X'`; not `--api-key-env NAME` and not `--tokenizer X`.
_NAMED = r"(?:api[-_]?key|token|secret|password)(?:=|\s+)"
_VALUE = r"""'[^']*'|"[^"]*"|[^\s'"-][^\s'"]*"""
_SECRET = re.compile(f"({_NAMED})(?:{_VALUE})", re.IGNORECASE)


def redacted(text: str) -> str:
    """A command line with `***` for every value of an option or variable that holds a secret."""
    return _SECRET.sub(r"\1***", text)
