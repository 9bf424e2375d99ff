"""Requests whose steps tell the parts of a step's cost apart; offered before anything is predicted.

A workload's own steps are alike: batches of the size that its rate brings about. These are laid out
instead: decodes alone at each batch size and at short and long contexts, prompts alone, and both
mixed, so that what is fitted to them holds for other batch limits and other rates.

A machine's speed drifts within seconds, and what is measured once is measured at one speed: a batch
size that met a slow moment would seem dear for ever. Decodes at short contexts take little, so
all sizes have them several times, with the dearer parts between. Those come in the order of what
they take, as a slow machine does not get to the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.workload.materialise import LoadRequest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_STEPS = 24
# Shares of the longest sequence that prompts fill.
PROMPT_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)
SHORT, LONG = PROMPT_SHARES[0], PROMPT_SHARES[-2]
# Batches of long contexts up to this size come before the last decodes at short ones.
FEW_LONG = 16
# Requests of the mixed part: each joins while earlier ones decode.
MIXED_REQUESTS = 24
MIXED_PLACE = len(PROMPT_SHARES)  # among the parts
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

    def decodes(size: int, share: float, name: str = "decode") -> list[LoadRequest]:
        names = [f"{name}-{size}-{share}-{i}" for i in range(size)]
        return [request(each, share * longest, DECODE_STEPS) for each in names]

    def fits(size: int, share: float) -> bool:
        return size * (share * longest + DECODE_STEPS) <= room

    def short(name: str) -> list[list[LoadRequest]]:
        return [decodes(size, SHORT, name) for size in sizes if fits(size, SHORT)]

    sizes = [size for size in BATCH_SIZES if size <= max_num_seqs]
    long = {size: decodes(size, LONG) for size in sizes if fits(size, LONG)}
    mixed = []
    for place in range(MIXED_REQUESTS):
        share = PROMPT_SHARES[place % (len(PROMPT_SHARES) - 1)]
        outputs = MIXED_DECODES // 4 + (place * 7) % MIXED_DECODES
        mixed.append(request(f"mixed-{place}", share * longest, outputs))
    return [
        # Prompts, one after another: each alone in its steps.
        *([request(f"prompt-{share}", share * longest, 2)] for share in PROMPT_SHARES),
        mixed,
        *short("decode"),
        *short("again"),
        *(part for size, part in long.items() if size <= FEW_LONG),
        *short("last"),
        *(part for size, part in long.items() if size > FEW_LONG),
    ]
