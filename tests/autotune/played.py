"""An engine that is played: a search over it takes no time and needs no model's weights."""

from __future__ import annotations

import threading
from collections.abc import Callable

from autotune.measure import at_rate
from autotune.metrics import compute_metrics
from autotune.records import RequestRecord, RunFolder
from autotune.search.messages import Failed, MeasureCommand, Measured
from autotune.search.windows import read_windows
from autotune.slo import parse_slo
from engine.config import EngineConfig

# Seconds to the first token by quantization: int4 is the fastest, int8 breaks most promises.
TTFT = {"none": 0.15, "int8": 0.5, "int4": 0.05}

Play = Callable[[MeasureCommand], Measured | Failed | None]


def play_nothing(_: MeasureCommand) -> None:
    return None


class PlayedEvaluator:
    """Answers as an engine would whose latency follows from its config and the rate.

    `play` may answer in its place, or raise.
    """

    play: Play = staticmethod(play_nothing)

    def __init__(self, folder: RunFolder, stop: threading.Event, _: object) -> None:
        self._folder = folder

    def __enter__(self) -> PlayedEvaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def measure(self, command: MeasureCommand, time_limit: float) -> Measured | Failed:
        answer = type(self).play(command)
        if answer is not None:
            return answer
        requests = at_rate(read_windows(self._folder)[command.window], command.rate_factor)
        slo = parse_slo(command.slo)
        ttft = TTFT[command.config["quantization"]] * (command.rate_factor or 1.0)
        records = [
            RequestRecord(
                r.request_id,
                r.arrival_s,
                r.arrival_s,
                (
                    # No two rounds are quite alike.
                    r.arrival_s + ttft * (1 + 0.01 * command.window) + 0.001 * (i % 7),
                    r.arrival_s + ttft + 0.1,
                ),
                len(r.token_ids),
                2,
                2,
                "finished",
            )
            for i, r in enumerate(requests)
        ]
        metrics = compute_metrics(
            records,
            slo,
            config=EngineConfig.from_mapping(command.config),
            load_delivered=True,
            load_note=None,
            seed=command.seed,
        )
        self._folder.write_part(command.trial, records, [])
        return Measured(metrics)


def play(evaluator: type[PlayedEvaluator], answer: Play) -> None:
    evaluator.play = staticmethod(answer)  # type: ignore[method-assign]
