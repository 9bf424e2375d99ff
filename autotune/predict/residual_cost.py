"""The cost of steps by a calibration: the fitted sum, what it leaves out, and graphs' padding."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from autotune.predict.residual import NO_RESIDUAL, Residual
from autotune.predict.step_cost import StepCost, StepWork, decode_line
from autotune.predict.step_times import DecodeLine


@dataclass(frozen=True, slots=True)
class CalibratedCost:
    """Seconds of a step; implements `autotune.predict.virtual_engine.Cost`.

    `decode` and `prompt` are factors on the device time of steps that only decode and of the
    others, `host` one on the host's. `ladder` are the batch sizes, ascending, to which steps of
    decodes are padded; empty where they run as they are.
    """

    cost: StepCost
    residual: Residual = NO_RESIDUAL
    decode: float = 1.0
    prompt: float = 1.0
    host: float = 1.0
    ladder: tuple[int, ...] = ()
    _lines: dict[int, DecodeLine] = field(default_factory=dict, compare=False, repr=False)

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        if work.prefill_sequences:
            return self.prompt * self.residual.factor(work) * self.cost.device_seconds(work)
        work = self._padded(work)
        return self.decode * self.residual.factor(work) * self.cost.device_seconds(work)

    def host_seconds(self, work: StepWork) -> float:
        """Seconds of a step that the device waits for the host."""
        return self.host * self.cost.host_seconds(work)

    def decode_line(self, sequences: int) -> DecodeLine:
        """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

        Between the contexts at which attention was measured it is straight.
        """
        known = self._lines.get(sequences)
        if known is None:
            known = decode_line(self, self.cost.decode_attention, sequences)
            self._lines[sequences] = known
        return known

    def _padded(self, work: StepWork) -> StepWork:
        """What a captured step computes: sequences of no context fill it up to its size."""
        count = work.decode_sequences
        place = bisect_left(self.ladder, count)
        if place == len(self.ladder) or self.ladder[place] == count:
            return work
        more = self.ladder[place] - count
        return work._replace(rows=work.rows + more, sampled=work.sampled + more)
