"""Recognising a workload's format from its content."""

from __future__ import annotations

from itertools import islice

from autotune.errors import BadInput
from autotune.workload.source import Source
from autotune.workload.timed_trace import MOONCAKE_BLOCK_TOKENS, infer_block_tokens

FORMATS = (
    "azure",
    "mooncake",
    "burstgpt",
    "sharegpt",
    "custom",
    "timed_trace",
    "openai_batch",
)
_SAMPLE_ROWS = 64


def detect_format(source: Source) -> str:
    """The format of a file, one of `FORMATS`.

    Raises:
        BadInput: none of them; the message says what was found and what is readable.
    """
    first = source.first_character()
    if not first:
        raise BadInput(f"{source} holds no requests: it has nothing but whitespace")
    if first == "[":
        return "sharegpt"
    return _json_format(source) if first == "{" else _csv_format(source)


def _csv_format(source: Source) -> str:
    number, header = next((n, text) for n, text in source.lines() if text.strip())
    columns = {name.strip().strip('"') for name in header.split(",")}
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return "azure"
    if not {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        source.fail(
            number,
            f"{header.strip()[:60]!r} begins no known workload; a CSV file must have the columns "
            "TIMESTAMP,ContextTokens,GeneratedTokens (azure) or Timestamp,Request tokens,Response "
            f"tokens (burstgpt), and the other formats ({', '.join(FORMATS)}) are JSON",
        )
    return "burstgpt"


def _json_format(source: Source) -> str:
    first = next(source.json_lines())
    if "conversations" in first:
        return "sharegpt"
    if "body" in first or "response" in first:
        return "openai_batch"
    if {"timestamp", "input_length", "output_length"} <= first.values.keys():
        return _trace_format(source)
    if "prompt" not in first and "prompt_token_ids" not in first:
        names = ", ".join(map(repr, list(first.values)[:8]))[:80] or "no fields"
        source.fail(
            first.line,
            f"an object with {names} belongs to no known workload; JSON rows have timestamp, "
            "input_length and output_length (mooncake, timed_trace), prompt (custom), "
            "conversations (sharegpt) or body (openai_batch)",
        )
    return "custom"


def _trace_format(source: Source) -> str:
    """Mooncake's fields are vLLM's: whole milliseconds and blocks of 512 tell it apart."""
    rows = list(islice(source.json_lines(), _SAMPLE_ROWS))
    whole = sum(type(row.values.get("timestamp")) is int for row in rows)
    if whole * 2 > len(rows) and infer_block_tokens(rows) == MOONCAKE_BLOCK_TOKENS:
        return "mooncake"
    return "timed_trace"
