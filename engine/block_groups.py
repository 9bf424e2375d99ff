"""Layers in groups that share a block table, so that windowed layers keep only what they see.

A model whose layers see all tokens has one group. In a model that mixes windows, layers of one kind
form groups of equal size, as in vLLM's hybrid KV cache. A block holds the keys and values of
`block_size` tokens for the layers of one group; as groups are of one size, a block that a windowed
group gives up serves any other group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Layers of one kind: `window` is what a token sees, itself included; 0 means all tokens.

    `layers` are indices into the model's layers. The last group of a kind may have fewer than the
    others; its blocks are then not filled.
    """

    window: int
    layers: tuple[int, ...]


ONE_GROUP = (BlockGroup(0, (0,)),)
"""The groups of a cache of which nothing is known but that every layer sees all tokens."""


def block_groups(layer_windows: Sequence[int], max_model_len: int) -> tuple[BlockGroup, ...]:
    """The groups of a model, those that see all tokens first; at least one.

    A group has as many layers as the rarer kind, or all of them if there is one kind. A window as
    long as the longest sequence, `max_model_len` tokens, is no window.
    """
    kinds: dict[int, list[int]] = {}
    for layer, window in enumerate(layer_windows):
        kinds.setdefault(window if window < max_model_len else 0, []).append(layer)
    size = min(map(len, kinds.values()))
    return tuple(
        BlockGroup(window, tuple(layers[start : start + size]))
        for window, layers in sorted(kinds.items())
        for start in range(0, len(layers), size)
    )


def group_of_layer(groups: Sequence[BlockGroup]) -> list[int]:
    """For each layer of the model the index of its group."""
    owner = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return [owner[layer] for layer in range(len(owner))]


def window_blocks(window: int, block_size: int) -> int:
    """Most blocks that `window` tokens in a row can lie in."""
    return (window - 2) // block_size + 2


def most_owned_blocks(windows: Sequence[int], num_blocks: int, block_size: int) -> int:
    """Most blocks that a sequence of `num_blocks` blocks' length owns at once in all groups.

    With windows that slide by one token; a step that computes more needs blocks for those.
    """
    return sum(
        min(num_blocks, window_blocks(window, block_size)) if window else num_blocks
        for window in windows
    )


def longest_sequence(windows: Sequence[int], num_blocks: int, block_size: int, most: int) -> int:
    """Tokens of the longest sequence, of at most `most`, that never owns over `num_blocks`."""
    low, high = 0, -(-most // block_size)
    while low < high:
        middle = (low + high + 1) // 2
        if most_owned_blocks(windows, middle, block_size) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return min(most, low * block_size)


def mean_visible_tokens(groups: Sequence[BlockGroup], context: int, num_tokens: int) -> float:
    """Cached tokens that the last `num_tokens` of `context` see, as a mean over the layers."""
    layers = sum(len(group.layers) for group in groups)
    seen = sum(
        len(group.layers)
        * (min(context, group.window - 1 + num_tokens) if group.window else context)
        for group in groups
    )
    return seen / layers
