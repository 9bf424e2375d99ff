"""The cost of a step on a GPU that is known by its data sheet, as the simulator asks for it."""

from __future__ import annotations

from bisect import bisect_left

from autotune.planning.device_rates import DeviceRates
from autotune.planning.model_shape import ModelShape
from autotune.planning.step_parts import StepParts
from autotune.predict.step_cost import TERMS, StepWork
from autotune.predict.step_times import DecodeLine
from engine.config import EngineConfig
from engine.graph_sizes import decode_sizes, most_sequences

# Any two points tell a straight line; these keep the digits of its slope.
_FAR_TOKENS = 1 << 20


class CatalogueCost:
    """Seconds of a step by its work; see `autotune.planning.step_parts`.

    A step of decodes alone is a captured graph, padded to the next batch size of the ladder. Any
    other step waits for the host where it launches kernels slower than the device runs them.

    Args:
        shape: the model.
        config: the knobs.
        rates: what the GPU achieves.
        known: the cost under a config with the same ranks, methods and dtype, whose tables count.
    """

    def __init__(
        self,
        shape: ModelShape,
        config: EngineConfig,
        rates: DeviceRates,
        known: CatalogueCost | None = None,
    ) -> None:
        if known is None:
            parts = StepParts.of(shape, config, rates)
            self._layers, self._head = parts.layers_curve(), parts.head_curve()
        else:
            parts, self._layers, self._head = known.parts, known._layers, known._head
        self.parts: StepParts = parts
        self._factor = rates.whole_step
        self._decode_constant, self._decode_token = parts.decode_attention()
        self._prompt = parts.prompt_attention()
        self._sums, self._sum_row = parts.communication()
        self._sizes = decode_sizes(most_sequences(config)) if config.cuda_graphs else []
        self._launching = parts.kernels * rates.launch
        self._host_step, self._host_sequence = rates.host_step, rates.host_sequence

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device, those included in which it waits for launches."""
        padded = self._padding(work)
        rows, sampled = work.rows * padded, work.sampled * padded
        seconds = self._layers.at(rows) + self._head.at(sampled)
        seconds += self._sums + self._sum_row * rows
        if work.decode_sequences:
            seconds += self._decode_constant + self._decode_token * work.decode_kv_tokens
        if work.prefill_sequences:
            constant, pair, kv_token, token = self._prompt
            seconds += constant + pair * work.prefill_pairs + kv_token * work.prefill_kv_tokens
            seconds += token * work.prompt_tokens
        seconds *= self._factor
        return seconds if self._captured(work) else max(seconds, self._launching)

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host during which the device idles."""
        return self._host_step + self._host_sequence * work.sequences

    def decode_line(self, sequences: int) -> DecodeLine:
        """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

        Straight, but for a step that is not captured: it takes no less than its launches.
        """
        work = StepWork(sequences, 0, sequences, sequences, 0, 0, 0)
        host = self.host_seconds(work)
        slope = self._factor * self._decode_token
        padded = self._padding(work)
        rows = sequences * padded
        base = self._layers.at(rows) + self._head.at(rows) + self._sums + self._sum_row * rows
        base = self._factor * (base + self._decode_constant)
        tokens = [0.0, float(_FAR_TOKENS)]
        if not self._captured(work) and base < self._launching:
            turn = (self._launching - base) / slope
            tokens = [0.0, turn, turn + _FAR_TOKENS]
        seconds = [base + slope * seen for seen in tokens]
        if not self._captured(work):
            seconds = [max(s, self._launching) for s in seconds]
        return DecodeLine(tuple(tokens), tuple(s + host for s in seconds))

    def terms(self, work: StepWork) -> dict[str, float]:
        """Device seconds by `autotune.predict.step_cost.TERMS`; they sum to `device_seconds`.

        `overhead` are the latencies of kernels, and what launching them takes beyond.
        """
        padded = self._padding(work)
        rows, sampled = work.rows * padded, work.sampled * padded
        parts = dict.fromkeys(TERMS, 0.0)
        for read, compute, latency in (
            self.parts.split_layers(rows),
            self.parts.split_head(sampled),
        ):
            parts["weights"] += read
            parts["linear_compute"] += compute
            parts["overhead"] += latency
        parts["communication"] = self._sums + self._sum_row * rows
        if work.decode_sequences:
            parts["overhead"] += self._decode_constant
            parts["kv_reads"] = self._decode_token * work.decode_kv_tokens
        if work.prefill_sequences:
            constant, pair, kv_token, token = self._prompt
            parts["overhead"] += constant
            parts["prefill_attention"] = (
                pair * work.prefill_pairs
                + kv_token * work.prefill_kv_tokens
                + token * work.prompt_tokens
            )
        parts = {name: seconds * self._factor for name, seconds in parts.items()}
        # The curves' straight pieces, and launches that the device waits for.
        parts["overhead"] += self.device_seconds(work) - sum(parts.values())
        return parts

    def _captured(self, work: StepWork) -> bool:
        if work.prefill_sequences or not self._sizes:
            return False
        return work.decode_sequences <= self._sizes[-1]

    def _padding(self, work: StepWork) -> float:
        """How many times as many rows a step has as padded for its graph."""
        if not work.decode_sequences or not self._captured(work):
            return 1.0
        size = self._sizes[bisect_left(self._sizes, work.decode_sequences)]
        return size / work.decode_sequences
