"""What a step costs, as a sum of parts that were measured alone and fitted to real steps.

    device = linear * layers(rows) + head * output head(sampled)
           + decode_attention * attention of decodes(sequences, context, drafted tokens)
           + prefill_attention * (a pair of query and key, a cached token read)
           + row * rows + sequence * sequences + chunk * prompt chunks + base + communication
           + verify + drafted * drafted tokens, of steps that have any
    host   = host_base + host_sequence * sequences + host_row * rows + host_chunk * prompt chunks
           + host_verify + host_drafted * drafted tokens, of steps that have any

The functions in it come from the probes of this machine (`engine.step_probes`), so that another
quantization or cache dtype exchanges a function and keeps the rest; the coefficients come from the
steps of the workload (`autotune.predict.fit`) and are about 1 where the probes tell the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from autotune.predict.curves import Curve, Surface
from autotune.predict.step_times import DecodeLine
from engine.attention_work import attention_work
from engine.batch import Batch, ScheduledSequence
from engine.block_groups import ONE_GROUP, BlockGroup
from engine.step_record import StepRecord

TERMS = (
    "weights",
    "linear_compute",
    "prefill_attention",
    "kv_reads",
    "communication",
    "overhead",
)


class StepWork(NamedTuple):
    """What a step computes, in tokens.

    `rows` are the tokens that pass the linear layers, `sampled` the rows of the output head.
    `decode_kv_tokens` are the cached tokens that decodes see, `prefill_kv_tokens` those that prompt
    chunks see, `prefill_pairs` the pairs of query and key of prompt chunks; with windows, means
    over the layers. `drafted` are the tokens that decodes verify beside their last ones; they are
    among the `rows` and the `sampled`.
    """

    rows: float
    prefill_sequences: int
    decode_sequences: int
    sampled: float
    decode_kv_tokens: float
    prefill_kv_tokens: float
    prefill_pairs: float
    drafted: float = 0

    @classmethod
    def of(cls, step: StepRecord) -> StepWork:
        """The work of a recorded step."""
        drafted = step.drafted_tokens
        return cls(
            step.prefill_tokens + step.decode_sequences + drafted,
            step.prefill_sequences,
            step.decode_sequences,
            (step.sampled_sequences or step.decode_sequences) + drafted,
            step.kv_tokens_read - step.prefill_kv_tokens_read,
            step.prefill_kv_tokens_read,
            step.prefill_pairs,
            drafted,
        )

    @classmethod
    def of_batch(cls, batch: Batch, groups: Sequence[BlockGroup] = ONE_GROUP) -> StepWork:
        """The work of a batch that is about to run; `groups` are the cache's."""
        uniform = len(groups) == 1 and not groups[0].window
        work = attention_work(batch, groups, uniform=uniform)
        sequences, decodes = batch.sequences, batch.num_decodes
        chunks = sequences[decodes:]
        drafted = sum([s.num_tokens for s in sequences[:decodes]]) - decodes
        return cls(
            decodes + drafted + sum([s.num_tokens for s in chunks]),
            len(chunks),
            decodes,
            decodes + drafted + sum([s.samples for s in chunks]),
            work.kv_tokens - work.prefill_kv_tokens,
            work.prefill_kv_tokens,
            work.prefill_pairs,
            drafted,
        )

    @classmethod
    def of_chunks(cls, chunks: list[ScheduledSequence], decodes: int, seen: int) -> StepWork:
        """The work of prompt chunks beside decodes that see `seen` tokens; every layer sees all."""
        rows, samples = decodes, decodes
        if not chunks:
            return cls(rows, 0, decodes, samples, seen, 0, 0)
        work = attention_work(Batch(chunks, 0), ONE_GROUP, uniform=True)
        for chunk in chunks:
            rows += chunk.num_tokens
            samples += chunk.samples
        read = work.prefill_kv_tokens
        return cls(rows, len(chunks), decodes, samples, seen, read, work.prefill_pairs)

    @classmethod
    def of_decodes(cls, sequences: int, seen: float, drafted: float = 0) -> StepWork:
        """The work of decodes alone that see `seen` tokens together, `drafted` ones verified."""
        rows = sequences + drafted
        return cls(rows, 0, sequences, rows, seen, 0, 0, drafted)

    @classmethod
    def of_prompt(cls, tokens: int, cached: int = 0) -> StepWork:
        """The work of a step with one whole prompt, of which `cached` tokens are in the cache."""
        new = tokens - cached
        return cls(new, 1, 0, 1, 0, tokens, new * cached + new * (new + 1) // 2)

    @property
    def sequences(self) -> int:
        """Sequences of the step."""
        return self.prefill_sequences + self.decode_sequences

    @property
    def prompt_tokens(self) -> float:
        """The rows that are prompt tokens."""
        return self.rows - self.decode_sequences - self.drafted

    @property
    def drafted_pairs(self) -> float:
        """Pairs of query and key of the drafted tokens, with the mean context."""
        if not self.drafted:
            return 0.0
        return self.drafted * self.decode_kv_tokens / self.decode_sequences

    def verifying(self, tokens: float) -> StepWork:
        """The same with `tokens` tokens computed for each decode instead of one (speculation)."""
        more = (tokens - 1) * self.decode_sequences
        return self._replace(
            rows=self.rows + more, sampled=self.sampled + more, drafted=self.drafted + more
        )


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Of the sum above: factors on measured functions, and seconds by what they count."""

    linear: float = 1.0
    head: float = 1.0
    decode_attention: float = 1.0
    prefill_attention: float = 1.0
    row: float = 0.0
    sequence: float = 0.0
    base: float = 0.0
    communication_row: float = 0.0
    communication_base: float = 0.0
    host_row: float = 0.0
    host_sequence: float = 0.0
    host_base: float = 0.0
    chunk: float = 0.0
    host_chunk: float = 0.0
    verify: float = 0.0
    host_verify: float = 0.0
    drafted: float = 0.0
    host_drafted: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """Seconds a pair of query and key, a cached token that a chunk sees, and a new token."""

    pair: float
    kv_token: float
    token: float = 0.0

    def at(self, pairs: float, kv_tokens: float, tokens: float) -> float:
        """Seconds of all layers."""
        return self.pair * pairs + self.kv_token * kv_tokens + self.token * tokens


@dataclass(frozen=True, slots=True)
class CostFactors:
    """How many times as long a part takes, by the names of `autotune.predict.change.Term`.

    `step_overhead` is added to steps with decodes, as a share of them; 0 adds nothing.
    """

    weight_reads: float = 1.0
    linear_compute: float = 1.0
    attention_compute: float = 1.0
    kv_reads: float = 1.0
    host: float = 1.0
    communication: float = 1.0
    device: float = 1.0
    step_overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by its work; see the module."""

    layers: Curve
    head: Curve
    decode_attention: Surface
    prefill_attention: PrefillAttention
    coefficients: Coefficients = field(default_factory=Coefficients)
    factors: CostFactors = field(default_factory=CostFactors)

    def device_seconds(self, work: StepWork) -> float:
        """Seconds that the device takes for a step."""
        k, f = self.coefficients, self.factors
        reads, compute = f.weight_reads, f.linear_compute
        seconds = (
            k.linear * self.layers.scaled(work.rows, reads, compute)
            + k.head * self.head.scaled(work.sampled, reads, compute)
            + sum(self._decode_attention(work))
            + self._prefill_attention(work)
            + self._overhead(work)
            + self._communication(work)
        )
        return seconds * self._slowdown(work)

    def host_seconds(self, work: StepWork) -> float:
        """Seconds of a step that the device waits for the host."""
        k = self.coefficients
        rows = k.host_row * work.rows + k.host_sequence * work.sequences + k.host_base
        if work.drafted:
            rows += k.host_verify + k.host_drafted * work.drafted
        return (rows + k.host_chunk * work.prefill_sequences) * self.factors.host

    def decode_line(self, sequences: int) -> DecodeLine:
        """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

        Between the contexts at which attention was measured it is straight.
        """
        return decode_line(self, self.decode_attention, sequences)

    def terms(self, work: StepWork) -> dict[str, float]:
        """Device seconds by `TERMS`; they sum to `device_seconds`.

        Linear layers are `weights` as far as reading them takes the time, and `linear_compute` as
        far as arithmetic does. The attention of decodes is `kv_reads` as far as it grows with what
        they see; what it takes in any case is `overhead`.
        """
        k, f = self.coefficients, self.factors
        parts = dict.fromkeys(TERMS, 0.0)
        for scale, curve, rows in (
            (k.linear, self.layers, work.rows),
            (k.head, self.head, work.sampled),
        ):
            read, computed = curve.split(rows)
            read, computed = read * f.weight_reads, computed * f.linear_compute
            if read + computed > 0:
                total = scale * curve.scaled(rows, f.weight_reads, f.linear_compute)
                parts["weights"] += total * read / (read + computed)
                parts["linear_compute"] += total * computed / (read + computed)
        parts["prefill_attention"] = self._prefill_attention(work)
        constant, parts["kv_reads"] = self._decode_attention(work)
        parts["communication"] = self._communication(work)
        parts["overhead"] = constant + self._overhead(work)
        slowdown = self._slowdown(work)
        if slowdown != 1.0:
            parts = {name: seconds * slowdown for name, seconds in parts.items()}
        return parts

    def _decode_attention(self, work: StepWork) -> tuple[float, float]:
        """Seconds whatever the decodes see, and seconds of reading it."""
        if not work.decode_sequences:
            return 0.0, 0.0
        scale = self.coefficients.decode_attention
        constant, reading = self.decode_attention.split(
            work.decode_sequences, work.decode_kv_tokens
        )
        if work.drafted:
            constant += self.verification(work)
        return scale * constant, scale * reading * self.factors.kv_reads

    def verification(self, work: StepWork) -> float:
        """Seconds of the drafted tokens' attention, as probed: what they see is read already."""
        return self.prefill_attention.pair * work.drafted_pairs

    def _prefill_attention(self, work: StepWork) -> float:
        if not work.prefill_sequences:
            return 0.0
        measured = self.prefill_attention.at(
            work.prefill_pairs, work.prefill_kv_tokens, work.prompt_tokens
        )
        scale = self.coefficients.prefill_attention * self.factors.attention_compute
        return scale * measured

    def _overhead(self, work: StepWork) -> float:
        k = self.coefficients
        chunks = k.chunk * work.prefill_sequences
        verify = k.verify + k.drafted * work.drafted if work.drafted else 0.0
        return k.row * work.rows + k.sequence * work.sequences + k.base + chunks + verify

    def _communication(self, work: StepWork) -> float:
        k = self.coefficients
        seconds = k.communication_row * work.rows + k.communication_base
        return seconds * self.factors.communication

    def _slowdown(self, work: StepWork) -> float:
        factors = self.factors
        drafting = factors.step_overhead if work.decode_sequences else 0.0
        return factors.device * (1.0 + drafting)


class _Cost(Protocol):
    def device_seconds(self, work: StepWork) -> float: ...

    def host_seconds(self, work: StepWork) -> float: ...


def decode_line(cost: _Cost, attention: Surface, sequences: int) -> DecodeLine:
    """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

    `attention` is what the cost of decodes' attention is made of: between the contexts at which it
    was measured the cost is straight.
    """
    contexts = {context * sequences for line in attention.contexts for context in line}
    tokens = sorted({0.0, *contexts, 2.0 * max(contexts)})
    works = [StepWork.of_decodes(sequences, seen) for seen in tokens]
    seconds = [cost.device_seconds(work) + cost.host_seconds(work) for work in works]
    return DecodeLine(tuple(tokens), tuple(seconds))
