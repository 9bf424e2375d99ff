"""The batch sizes at which steps of decodes are captured; simulators pad by them too."""

from __future__ import annotations

from engine.config import KNOBS, EngineConfig

MOST_SEQUENCES = 512


def decode_sizes(most: int) -> list[int]:
    """The ladder of batch sizes up to `most` sequences: 1, 2, 4, then multiples of 8, then of 16.

    As in vLLM: what padding adds stays small, and so does the number of graphs.
    """
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, MOST_SEQUENCES + 1, 16)]
    most = min(most, MOST_SEQUENCES)
    below = [size for size in ladder if size < most]
    return [*below, most]


def most_sequences(config: EngineConfig) -> int:
    """Sequences of a step to be ready for.

    `max_num_seqs` can be raised while the cache stays, so not less than its default counts.
    """
    wanted = max(config.max_num_seqs, int(KNOBS["max_num_seqs"].default))
    return min(wanted, config.max_num_batched_tokens)
