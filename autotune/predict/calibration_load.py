"""Requests whose steps tell the parts of a step's cost apart; offered before anything is predicted.

A workload's own steps are alike: batches of the size that its rate brings about. These are laid out
instead: decodes alone at each batch size and at short and long contexts, prompts alone, and both
mixed, so that what is fitted to them holds for other batch limits and other rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from autotune.workload.materialise import LoadRequest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_STEPS = 24
# Shares of the longest sequence that prompts fill.
PROMPT_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)
# Requests of the mixed part: each joins while earlier ones decode.
MIXED_REQUESTS = 24
MIXED_DECODES = 40
_FEWEST_PROMPT = 4


def calibration_load(
    vocab_size: int,
    max_model_len: int,
    max_num_seqs: int,
    seed: int = 0,
    special_ids: Sequence[int] = (),
    cache_tokens: int | None = None,
) -> list[list[LoadRequest]]:
    """The parts of the load, each to be offered when the one before is done.

    Args:
        vocab_size: token ids are below it.
        max_model_len: most tokens of a sequence.
        max_num_seqs: batches are no larger.
        seed: of the prompts.
        special_ids: ids that prompts avoid.
        cache_tokens: tokens that the KV cache holds; batches that do not fit are left out.
    """
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(vocab_size), np.array(list(special_ids), dtype=np.int64))
    longest = max(_FEWEST_PROMPT, max_model_len - MIXED_DECODES - 1)
    room = cache_tokens or 1 << 62

    def request(name: str, prompt: float, output: int) -> LoadRequest:
        tokens = max(_FEWEST_PROMPT, min(longest, round(prompt)))
        ids = tuple(int(i) for i in rng.choice(allowed, size=tokens))
        return LoadRequest(name, 0.0, ids, output)

    parts: list[list[LoadRequest]] = []
    for share in PROMPT_SHARES:  # prompts, one after another: each alone in its steps
        parts.append([request(f"prompt-{share}", share * longest, 2)])
    for size in _sizes(max_num_seqs):
        for share in (PROMPT_SHARES[0], PROMPT_SHARES[-2]):
            tokens = share * longest
            if size * (tokens + DECODE_STEPS) <= room:
                parts.append(
                    [
                        request(f"decode-{size}-{share}-{i}", tokens, DECODE_STEPS)
                        for i in range(size)
                    ]
                )
    mixed = []
    for place in range(MIXED_REQUESTS):
        share = PROMPT_SHARES[place % (len(PROMPT_SHARES) - 1)]
        outputs = MIXED_DECODES // 4 + (place * 7) % MIXED_DECODES
        mixed.append(request(f"mixed-{place}", share * longest, outputs))
    parts.append(mixed)
    return parts


def _sizes(most: int) -> Iterator[int]:
    yield from (size for size in BATCH_SIZES if size <= most)
