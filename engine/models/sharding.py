"""Which part of each matrix a rank has.

Query heads, the inner features of MLPs and experts, and the vocabulary are divided; where there
are fewer key/value heads than ranks, neighbouring ranks have the same one. Norms and routers are
everywhere. Matrices whose outputs are divided are cut by rows, those that take them in by columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine.config import KNOBS
from engine.errors import ConfigError
from engine.models.spec import DecoderSpec
from engine.models.tensors import LinearParts

# Rows of an output head in one piece, so that matmuls are not left with odd ends.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Rows or columns from `start` up to `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Cut:
    """What is taken of a linear layer: runs of rows of each of its parts, or a run of columns.

    `bias`: whether this rank adds it; where outputs are summed over the ranks only one may.
    """

    rows: tuple[tuple[Run, ...], ...] | None = None
    columns: Run | None = None
    bias: bool = True


WHOLE = Cut()


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size` of a model."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> Run:
        """This rank's of `count` things that the ranks divide."""
        each = count // self.size
        return Run(self.rank * each, (self.rank + 1) * each)

    def kv_heads(self, count: int) -> Run:
        """This rank's key/value heads: its share, or the one that its query heads look at."""
        if count >= self.size:
            return self.of(count)
        head = self.rank * count // self.size
        return Run(head, head + 1)

    def vocabulary(self, size: int) -> Run:
        """This rank's token ids; the last rank's may be fewer."""
        each = self.vocabulary_rows(size)
        return Run(min(size, self.rank * each), min(size, (self.rank + 1) * each))

    def vocabulary_rows(self, size: int) -> int:
        """Token ids of the ranks that have most."""
        each = -(-size // self.size)
        rounded = -(-each // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        return rounded if (self.size - 1) * rounded < size else each

    def spec(self, spec: DecoderSpec) -> DecoderSpec:
        """The decoder that one rank computes: its heads and inner features, all of the rest."""
        if self.size == 1:
            return spec
        experts = spec.experts
        if experts is not None:
            inner = len(self.of(experts.intermediate_size))
            experts = dataclasses.replace(experts, intermediate_size=inner)
        return dataclasses.replace(
            spec,
            num_heads=len(self.of(spec.num_heads)),
            num_kv_heads=len(self.kv_heads(spec.num_kv_heads)),
            intermediate_size=len(self.of(spec.intermediate_size)),
            experts=experts,
        )

    def cut(self, spec: DecoderSpec, name: str, parts: LinearParts) -> Cut:
        """What this rank takes of the linear layer `name` (see `layer_linears`) of the model."""
        if self.size == 1:
            return WHOLE
        if name == "qkv":
            kv = self.kv_heads(spec.num_kv_heads)
            dim = spec.head_dim
            runs = [
                Run(run.start * dim, run.stop * dim) for run in (self.of(spec.num_heads), kv, kv)
            ]
            return Cut(_by_part(runs, spec.qkv_sizes, parts))
        if name == "output":
            heads = self.of(spec.num_heads)
            columns = Run(heads.start * spec.head_dim, heads.stop * spec.head_dim)
            return Cut(columns=columns, bias=self.rank == 0)
        if name.endswith("gate_up"):
            inner = sum(parts.rows) // 2
            return Cut(_by_part([self.of(inner)] * 2, (inner, inner), parts))
        return Cut(columns=self.of(parts.columns), bias=self.rank == 0)


ALL = Shard()


def check_divides(spec: DecoderSpec, size: int) -> None:
    """Refuse a number of ranks that a model cannot be divided among.

    Raises:
        ConfigError: it does not divide the query heads or the inner features, the key/value heads
            neither way, or is more than the vocabulary has pieces.
    """
    obstacle = _obstacle(spec, size)
    if obstacle is not None:
        choices = KNOBS["tensor_parallel_size"].choices or ()
        fitting = ", ".join(str(choice) for choice in choices if divides(spec, choice))
        raise ConfigError(f"tensor_parallel_size={size} {obstacle}: choose of {fitting}")


def divides(spec: DecoderSpec, size: int) -> bool:
    """Whether a model can be divided among so many ranks."""
    return _obstacle(spec, size) is None


def _obstacle(spec: DecoderSpec, size: int) -> str | None:
    if size == 1:
        return None
    inner = [("inner features of the MLP", spec.intermediate_size)]
    if spec.experts is not None:
        inner = inner if not all(spec.experts.layers) else []
        inner.append(("inner features of an expert", spec.experts.intermediate_size))
    for title, count in [("attention heads", spec.num_heads), *inner]:
        if count % size:
            return f"does not divide the model's {count} {title}"
    heads = spec.num_kv_heads
    if heads % size and size % heads:
        return (
            f"neither divides the model's {heads} key/value heads nor is a multiple of their number"
        )
    if (size - 1) * Shard(0, size).vocabulary_rows(spec.vocab_size) >= spec.vocab_size:
        return f"is too much for a vocabulary of {spec.vocab_size}"
    return None


def _by_part(
    runs: list[Run], sections: tuple[int, ...], parts: LinearParts
) -> tuple[tuple[Run, ...], ...]:
    """Runs of each section of the stacked rows, as runs of the checkpoint's tensors.

    These are the sections themselves, or one tensor that holds them all.
    """
    if len(parts.prefixes) == len(sections):
        return tuple((run,) for run in runs)
    starts = [sum(sections[:place]) for place in range(len(sections))]
    return (
        tuple(Run(at + run.start, at + run.stop) for at, run in zip(starts, runs, strict=True)),
    )
