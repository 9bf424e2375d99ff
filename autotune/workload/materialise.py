"""From rows to requests: token ids for every prompt, the same in every process.

Traces tell lengths and which prefixes are equal, not texts. Token ids are synthesised so that
equal `prefix_ids` give equal prefixes, hence equal hits in a prefix cache, and everything else
differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from autotune.errors import BadInput
from autotune.workload.rows import Workload, WorkloadRow
from autotune.workload.transform import clip_lengths


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request ready to be sent: `arrival_s` in seconds since the load begins."""

    request_id: str
    arrival_s: float
    token_ids: tuple[int, ...]
    output_tokens: int
    session_id: str | None = None


class Tokenizer(Protocol):
    """What is needed to count and encode texts; `engine.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a prompt."""
        ...


def tokenise(workload: Workload, tokenizer: Tokenizer) -> Workload:
    """Replace texts by their token ids, and estimated lengths by counted ones."""
    texts = sum(row.prompt is not None for row in workload.rows)
    if not texts:
        return workload
    counted = workload.with_rows(
        (_tokenised(row, tokenizer) for row in workload.rows),
        f"{texts} texts were tokenised with the model's tokenizer",
    )
    notes = tuple(note for note in counted.notes if "estimates until they are tok" not in note)
    return dataclasses.replace(counted, notes=notes)


def materialise(
    workload: Workload,
    vocab_size: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    max_model_len: int | None = None,
    special_ids: Collection[int] = (),
) -> list[LoadRequest]:
    """Make the requests of a workload; the same arguments make the same requests anywhere.

    A block of a prefix is a pure function of its id, the position in it, `vocab_size` and `seed`;
    the tokens after the prefixes are drawn for each row alone. Rows longer than `max_model_len`
    are clipped (`clip_lengths`, which also leaves the note for a report when it is called before).

    Args:
        workload: the rows; texts need `tokenizer`.
        vocab_size: ids are below this.
        seed: of everything drawn.
        tokenizer: encodes texts.
        max_model_len: most tokens of prompt and output together.
        special_ids: ids that synthesised prompts avoid; those of recorded prompts stay.

    Raises:
        BadInput: a text without a tokenizer, token ids beyond the vocabulary, or no ordinary
            token in the vocabulary.
    """
    if tokenizer is not None:
        workload = tokenise(workload, tokenizer)
    if max_model_len is not None:
        workload = clip_lengths(workload, max_model_len)
    synthesiser = _Synthesiser(vocab_size, seed, special_ids)
    digits = len(str(max(len(workload.rows) - 1, 0)))
    return [
        LoadRequest(
            f"{index:0{digits}d}",
            row.arrival_s,
            _recorded(row, index, vocab_size) or synthesiser.prompt(row, index),
            row.output_tokens,
            row.session_id,
        )
        for index, row in enumerate(workload.rows)
    ]


def _recorded(row: WorkloadRow, index: int, vocab_size: int) -> tuple[int, ...] | None:
    if row.token_ids is None:
        if row.prompt is not None:
            raise BadInput(f"request {index} of the workload is a text, which needs a tokenizer")
        return None
    if max(row.token_ids) >= vocab_size:
        raise BadInput(
            f"request {index} of the workload has token id {max(row.token_ids)}; the model's "
            f"vocabulary ends at {vocab_size - 1}"
        )
    return row.token_ids


def _tokenised(row: WorkloadRow, tokenizer: Tokenizer) -> WorkloadRow:
    if row.prompt is None:
        return row
    ids = tuple(tokenizer.encode(row.prompt))
    if not ids:
        raise BadInput(f"the prompt {row.prompt[:40]!r} has no tokens in the model's tokenizer")
    output = row.output_tokens
    if row.completion is not None:
        output = max(1, len(tokenizer.encode(row.completion)))
    return dataclasses.replace(
        row,
        input_tokens=len(ids),
        output_tokens=output,
        prompt=None,
        completion=None,
        token_ids=ids,
    )


class _Synthesiser:
    """Draws token ids by name: the same name, the same tokens."""

    def __init__(self, vocab_size: int, seed: int, special_ids: Collection[int]) -> None:
        self._seed = seed
        ordinary = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_ids, dtype=np.int64))
        if ordinary.size < 2:
            raise BadInput(f"a vocabulary of {vocab_size} has too few ordinary tokens for prompts")
        self._ordinary = ordinary
        self._blocks: dict[tuple[int, int], npt.NDArray[Any]] = {}

    def prompt(self, row: WorkloadRow, index: int) -> tuple[int, ...]:
        """The prompt of a row of lengths: its prefix blocks, then tokens of its own."""
        parts: list[npt.NDArray[Any]] = []
        left = row.input_tokens
        if row.prefix_ids and row.prefix_block_tokens:
            for prefix_id in row.prefix_ids:
                block = self._block(prefix_id, row.prefix_block_tokens)[:left]
                parts.append(block)
                left -= len(block)
                if left == 0:
                    break
        if left:
            parts.append(self._draw(f"row {index}", left))
        return tuple(np.concatenate(parts).tolist())

    def _block(self, prefix_id: int, tokens: int) -> npt.NDArray[Any]:
        key = (prefix_id, tokens)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = self._draw(f"prefix {prefix_id}", tokens)
        return block

    def _draw(self, name: str, tokens: int) -> npt.NDArray[Any]:
        # A digest, not hash(): Python's hash of a text differs from process to process.
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        return self._ordinary[rng.integers(self._ordinary.size, size=tokens)]
