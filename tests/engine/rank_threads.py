"""The ranks of a model as threads of the test, joined by gloo as processes would be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.parallel import GroupRanks
from tests.engine.tiny_models import paged_logits

T = TypeVar("T")
CPU = torch.device("cpu")


def on_ranks(size: int, meeting: Path, work: Callable[[GroupRanks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks; the first error is raised."""
    outcomes: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        ranks = GroupRanks(rank, size, CPU)
        try:
            ranks.join(meeting)
            outcomes[rank] = work(ranks)
        except BaseException as error:
            errors.append(error)
        finally:
            ranks.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [outcomes[rank] for rank in range(size)]


def load_shard(
    folder: Path, ranks: GroupRanks, quantization: str = "none", max_position: int = 96
) -> Decoder:
    """A rank's part of a model, in float32."""
    opened = open_model_folder(folder)
    decoder = load_decoder(
        open_source(opened), decoder_spec(opened), torch.float32, CPU, quantization, ranks=ranks
    )
    decoder.set_max_position(max_position)
    return decoder


def parallel_logits(
    folder: Path,
    size: int,
    meeting: Path,
    tokens: list[int],
    chunks: list[int],
    quantization: str = "none",
) -> list[torch.Tensor]:
    """Each rank's logits of every position, as `paged_logits`."""
    return on_ranks(
        size,
        meeting,
        lambda ranks: paged_logits(load_shard(folder, ranks, quantization), tokens, chunks),
    )
