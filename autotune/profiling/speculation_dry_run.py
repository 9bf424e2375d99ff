"""What prompt lookup would have drafted on the recorded tokens, and how much would have been right.

At each decode step the last n tokens are looked for in what came before, the longest n first, and
what followed their latest occurrence is drafted (Saxena 2023, prompt lookup decoding; vLLM's
`ngram`). Greedy outputs do not depend on drafts, so that the recorded answer tells exactly which
would have been accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.profiling.enough import LEAST_REQUESTS, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import AcceptancePosition, Speculation

MIN_NGRAM = 2
MAX_NGRAM = 4
DRAFT_TOKENS = (1, 2, 3, 4, 5, 8)
# Enough for an estimate to a percent; beyond it every n-th request is looked at.
_MOST_TOKENS = 200_000


def speculation(evidence: LoadEvidence) -> tuple[Speculation | None, list[str]]:
    """The dry run on a load's requests, or why there is none."""
    prompts = evidence.prompts
    usable = [
        (prompts[r.request_id], r.output_token_ids)
        for r in evidence.requests
        if r.request_id in prompts and len(r.output_token_ids) > 1
    ]
    if not any(r.output_token_ids for r in evidence.requests) or not prompts:
        return None, ["what n-gram drafts would get is unknown: the records hold no tokens"]
    if len(usable) < LEAST_REQUESTS:
        return None, [lacking("the dry run of drafts", "requests", LEAST_REQUESTS, len(usable))]
    tokens = sum(len(prompt) + len(output) for prompt, output in usable)
    every = max(1, min(len(usable) // LEAST_REQUESTS, -(-tokens // _MOST_TOKENS)))
    return dry_run(usable[::every], synthetic=bool(evidence.synthetic_prompts)), []


def dry_run(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, synthetic: bool = False
) -> Speculation:
    """Draft along each (prompt, output); the first output token comes with the prompt."""
    longest = max(DRAFT_TOKENS)
    generated = found = decodes = 0
    steps = dict.fromkeys(DRAFT_TOKENS, 0)
    drafted = [0] * longest
    accepted = [0] * longest
    for prompt, output in requests:
        drafts = lookups((*prompt, *output), len(prompt) + 1, longest)
        generated += len(drafts)
        decodes += len(drafts)
        found += sum(length > 0 for length, _ in drafts)
        for k in DRAFT_TOKENS:
            at = 0
            while at < len(drafts):
                length, right = drafts[at]
                if k == longest:
                    for place in range(length):
                        drafted[place] += 1
                        accepted[place] += place < right
                at += min(right, k) + 1
                steps[k] += 1
    return Speculation(
        num_requests=len(requests),
        min_ngram=MIN_NGRAM,
        max_ngram=MAX_NGRAM,
        tokens_per_step={k: generated / count if count else 1.0 for k, count in steps.items()},
        hit_share=found / decodes if decodes else 0.0,
        positions=[
            AcceptancePosition(position=place + 1, drafted=drafted[place], accepted=accepted[place])
            for place in range(longest)
        ],
        synthetic_prompts=synthetic,
    )


def lookups(tokens: Sequence[int], start: int, longest: int) -> list[tuple[int, int]]:
    """For each position from `start` on, what a draft there would be: (its length, right ones).

    A draft for position i is made of the tokens before i alone, and has at most `longest`. Right
    are as many as agree with what came, up to the end of the sequence.
    """
    count = len(tokens)
    seen: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_NGRAM + 1)]
    result = []
    for i in range(MIN_NGRAM, count):
        ends = [(n, tuple(tokens[i - n : i])) for n in range(min(MAX_NGRAM, i), MIN_NGRAM - 1, -1)]
        if i >= start:
            match = next((seen[n][end] for n, end in ends if end in seen[n]), None)
            if match is None:
                result.append((0, 0))
            else:
                length = min(longest, i - match)
                right = 0
                most = min(length, count - i)
                while right < most and tokens[match + right] == tokens[i + right]:
                    right += 1
                result.append((length, right))
        for n, end in ends:
            seen[n][end] = i
    # Sequences that are shorter than an n-gram are drafted nothing.
    return [(0, 0)] * (count - start - len(result)) + result
