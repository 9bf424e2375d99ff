"""The shapes at which steps of decodes are captured; simulators pad by the batch sizes too."""

from __future__ import annotations

from typing import NamedTuple

from engine.config import KNOBS, EngineConfig

MOST_SEQUENCES = 512
# Larger batches verify no drafts that pay, and are left to steps without graphs.
MOST_VERIFYING = 64


class DecodeShape(NamedTuple):
    """A captured step: so many sequences, of at most so many new tokens each.

    Steps of one new token have it for each sequence; of longer ones the tokens that a sequence does
    not have lie behind all others, and belong to none. `has_trees` says whether drafted tokens may
    hide each other.
    """

    sequences: int
    new_tokens: int = 1
    has_trees: bool = False

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.sequences * self.new_tokens


def decode_sizes(most: int) -> list[int]:
    """The ladder of batch sizes up to `most` sequences: 1, 2, 4, then multiples of 8, then of 16.

    As in vLLM: what padding adds stays small, and so does the number of graphs.
    """
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, MOST_SEQUENCES + 1, 16)]
    most = min(most, MOST_SEQUENCES)
    below = [size for size in ladder if size < most]
    return [*below, most]


def decode_shapes(config: EngineConfig, *, has_windows: bool = False) -> list[DecodeShape]:
    """What is captured for a config: the ladder, and drafts' verification by powers of two.

    `has_windows`: of a model whose layers have, drafts are no trees.
    """
    most = most_sequences(config)
    shapes = [DecodeShape(size) for size in decode_sizes(most)]
    if config.speculative_method == "none":
        return shapes
    lengths = [2]
    while lengths[-1] < config.num_speculative_tokens + 1:
        lengths.append(min(2 * lengths[-1], config.num_speculative_tokens + 1))
    has_trees = config.speculative_method == "medusa" and not has_windows
    return shapes + [
        shape
        for size in decode_sizes(min(most, MOST_VERIFYING))
        for length in lengths
        if (shape := DecodeShape(size, length, has_trees)).num_tokens
        <= config.max_num_batched_tokens
    ]


def most_sequences(config: EngineConfig) -> int:
    """Sequences of a step to be ready for.

    `max_num_seqs` can be raised while the cache stays, so not less than its default counts.
    """
    wanted = max(config.max_num_seqs, int(KNOBS["max_num_seqs"].default))
    return min(wanted, config.max_num_batched_tokens)
