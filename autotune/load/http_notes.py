"""What a reader must know of figures that were measured over HTTP, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autotune.load.answer import Answer, CountedBy
from autotune.records import RequestRecord

# Kinds of trouble that are told one by one.
_MOST_REASONS = 3
_COUNTED: dict[CountedBy, str] = {
    "usage": "the server tells an answer's tokens only at its end: they were spread evenly over "
    "the chunks; the latencies are right, and which token came in which chunk is a guess",
    "tokenizer": "the server does not tell how many tokens an answer has: they were counted with "
    "the tokenizer that was given, on the answer's text",
    "chunks": "the server does not tell how many tokens an answer has: each chunk was counted as "
    "one, which is too few where a chunk holds several; --tokenizer counts them",
}


def load_notes(answers: Sequence[Answer], records: Sequence[RequestRecord]) -> list[str]:
    """How tokens were counted where it was not by the server's word, and what went wrong."""
    notes = []
    finished = [(a, r) for a, r in zip(answers, records, strict=True) if r.completed]
    ways = Counter(answer.counted_by for answer, _ in finished)
    notes += [text for way, text in _COUNTED.items() if ways[way]]
    if whole := sum(not answer.streamed for answer, _ in finished):
        notes.append(
            f"{whole} of {len(finished)} answers came in one piece although a stream was asked "
            "for: their first token is as late as their last"
        )
    short = [r for _, r in finished if r.output_tokens < r.asked_output_tokens]
    if short:
        got = sum(r.output_tokens for r in short)
        asked = sum(r.asked_output_tokens for r in short)
        notes.append(
            f"{len(short)} of {len(finished)} answers ended before the length that the workload "
            f"asks for, by {1 - got / asked:.0%} of it: the server does not ignore end tokens"
        )
    reasons = Counter(r.reason for r in records if not r.completed)
    total = sum(reasons.values())
    for reason, count in reasons.most_common(_MOST_REASONS):
        notes.append(f"{count} of {len(records)} requests did not finish: {reason}")
    if (others := total - sum(c for _, c in reasons.most_common(_MOST_REASONS))) > 0:
        notes.append(f"{others} more did not finish for other reasons; the records tell them")
    return notes
