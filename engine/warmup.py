"""Steps to run before any request, so that no measured step compiles a kernel.

GPU kernels are compiled for what their operands are like: their choice of tiles goes by powers of
two of the step's size, and numbers that multiples of 16 divide are treated apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.batch import Batch, ScheduledSequence
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.graph_sizes import decode_shapes
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft

# Kernels for more tokens are those for so many.
LARGEST = 16384
# New tokens after a long prefix, whose attention is split over the context by a kernel of its own.
CHUNKS = (16, 256)
GREEDY = SamplingParams(temperature=0.0)
KINDS = (
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, repetition_penalty=1.1, logprobs=2),
)


def warmup_batches(
    config: EngineConfig,
    max_model_len: int,
    blocks: Sequence[int],
    *,
    compiles: bool,
    most_captured: int = 0,
) -> Iterator[Batch]:
    """A prompt and a decode; where kernels are compiled, steps of all sizes that an engine runs.

    Args:
        config: the knobs.
        max_model_len: of the KV cache, in tokens.
        blocks: a block for each group of layers, which all sequences share.
        compiles: whether kernels are compiled.
        most_captured: decode steps of up to so many sequences have been captured.
    """
    batches = _Batches(max_model_len, config.block_size, blocks)
    if not compiles:
        yield from batches.prompts(2, 1)
        yield from batches.decodes(1, 3)
        return
    seats = config.max_num_seqs
    for size in sizes_up_to(min(config.max_num_batched_tokens, LARGEST)):
        yield from batches.prompts(size, seats)
    for size in CHUNKS:
        yield from batches.chunk(min(size, config.max_num_batched_tokens))
    for size in sizes_up_to(seats):
        if size > most_captured:
            yield from batches.decodes(size, 3)
    if not most_captured:
        for context in sizes_up_to(max_model_len):
            yield from batches.decodes(1, context)
    for shape in decode_shapes(config):
        if shape.new_tokens > 1 and shape.sequences in (1, 2, seats):
            yield from batches.decodes(shape.sequences, 3, drafted=shape.new_tokens - 1)
    for sampling in KINDS:
        for size in (1, 2):
            yield from batches.decodes(min(size, seats), 3, sampling)


def sizes_up_to(most: int) -> list[int]:
    """Powers of two and their predecessors, up to `most` and with it."""
    sizes = {most}
    power = 1
    while power <= most:
        sizes |= {power, max(power - 1, 1)}
        power *= 2
    return sorted(sizes)


class _Batches:
    def __init__(self, max_model_len: int, block_size: int, blocks: Sequence[int]) -> None:
        self._longest = max_model_len - 1  # with the token that is sampled
        self._block_size = block_size
        self._blocks = blocks

    def prompts(self, num_tokens: int, most_sequences: int) -> Iterator[Batch]:
        """New prompts of so many tokens together, unless the sequences do not suffice."""
        longest = self._longest
        if longest < 1 or num_tokens > longest * most_sequences:
            return
        lengths = [longest] * (num_tokens // longest)
        lengths += [num_tokens % longest] if num_tokens % longest else []
        sequences = [self._sequence(i, n, n, GREEDY) for i, n in enumerate(lengths)]
        decodes = len(lengths) if num_tokens == len(lengths) else 0
        yield Batch(sequences, decodes)

    def chunk(self, num_tokens: int) -> Iterator[Batch]:
        """So many last tokens of the longest prompt."""
        if num_tokens < self._longest:
            yield Batch([self._sequence(0, self._longest, num_tokens, GREEDY)], 0)

    def decodes(
        self, count: int, context: int, sampling: SamplingParams = GREEDY, drafted: int = 0
    ) -> Iterator[Batch]:
        """A decode step of sequences of so many tokens, or as many as there may be.

        With `drafted` tokens to be verified behind each one's last.
        """
        context = min(context, self._longest)
        if context < 1 or context + drafted > self._longest:
            return
        sequences = [self._sequence(i, context, 1, sampling) for i in range(count)]
        if drafted:
            for sequence in sequences:
                sequence.draft = Draft([0] * drafted)
                sequence.num_tokens += drafted
                for table in sequence.request.tables.groups:
                    table += [table[0]] * -(-drafted // self._block_size)
        yield Batch(sequences, count)

    def _sequence(
        self, index: int, tokens: int, new: int, sampling: SamplingParams
    ) -> ScheduledSequence:
        pages = -(-tokens // self._block_size)
        tables = BlockTables([[block] * pages for block in self._blocks])
        request = Request(f"warmup {index}", [0] * tokens, sampling, 0.0, tables=tables)
        return ScheduledSequence(request, tokens - new, new, True)
