"""What really enters a model's linear layers: kernels that split outliers off depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models.block import Observer, run_block
from engine.models.decoder import Decoder, embed
from kernels.metadata import build_attention_metadata

# Tokens that are sent through: nearly all columns that ever hold an outlier have held one by then.
TOKENS = 512
_BLOCK_SIZE = 16


def observe_rows(decoder: Decoder, threshold: float, seed: int = 0) -> Mapping[str, Tensor]:
    """The rows [T, K] that enter each kind of linear layer, for random tokens.

    They are those of the layer that has the median number of columns with an element of
    `threshold` or more in magnitude. By the names that `run_block` tells its observer; empty where
    ranks share the model, as one of them cannot run alone.
    """
    if decoder.ranks.size > 1 or not decoder.rotary_tables:
        return {}
    columns: dict[str, list[int]] = {}
    found: dict[str, Tensor] = {}

    def count(name: str, rows: Tensor) -> None:
        columns.setdefault(name, []).append(int((rows.abs() >= threshold).any(dim=0).sum()))

    _run(decoder, seed, count)
    middle = {name: _place_of_median(counts) for name, counts in columns.items()}
    passed = dict.fromkeys(columns, 0)

    # A second pass, rather than all rows of all layers in memory.
    def keep(name: str, rows: Tensor) -> None:
        if passed[name] == middle[name]:
            found[name] = rows.clone()
        passed[name] += 1

    _run(decoder, seed, keep)
    return found


def _place_of_median(counts: list[int]) -> int:
    return sorted(range(len(counts)), key=counts.__getitem__)[len(counts) // 2]


def _run(decoder: Decoder, seed: int, observe: Observer) -> None:
    spec, device = decoder.spec, decoder.device
    length = min(TOKENS, len(decoder.rotary_tables[0]))
    blocks = -(-length // _BLOCK_SIZE)
    one_layer = dataclasses.replace(spec, num_layers=1, layer_windows=spec.layer_windows[:1])
    cache = KVCache.allocate(one_layer, blocks, _BLOCK_SIZE, decoder.dtype, device).layers[0]
    tables = [list(range(blocks))]
    metadata = build_attention_metadata(tables, [length], [length], _BLOCK_SIZE, device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(spec.vocab_size, (length,), generator=generator).to(device)
    positions = torch.arange(length, device=device)
    with torch.inference_mode():
        residual, x = embed(spec, decoder.embedding, tokens), None
        for index, layer in enumerate(decoder.layers):
            table = decoder.rotary_tables[index]
            x, residual = run_block(
                spec, index, layer, x, residual, positions, table, cache, metadata, observe
            )
