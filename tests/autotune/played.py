"""An engine that is played: a search over it takes no time and needs no model's weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from autotune.measure import at_rate
from autotune.metrics import compute_metrics
from autotune.quality_guard import broken_limits, quality_entries
from autotune.records import RequestRecord, RunFolder
from autotune.search.messages import (
    Answer,
    BrokeGuard,
    Failed,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
)
from autotune.search.windows import read_windows
from autotune.slo import parse_slo
from engine.config import EngineConfig

# Seconds to the first token by quantization: int4 is the fastest, int8 breaks most promises.
# Methods that end in the same kernels are equally fast.
TTFT = {"none": 0.15, "int8": 0.5, "smoothquant": 0.5, "int4": 0.05, "gptq": 0.05, "awq": 0.05}

Play = Callable[[MeasureCommand], Measured | Failed | None]


def play_nothing(_: MeasureCommand) -> None:
    return None


class PlayedEvaluator:
    """Answers as an engine would whose latency follows from its config and the rate.

    `play` may answer in its place, or raise. `kl` is the divergence by quantization; without it no
    quality is measured.
    """

    play: Play = staticmethod(play_nothing)
    probed: Probed | Failed = Failed("rejected", "nothing is there to be probed")
    kl: Mapping[str, float] = {}

    def __init__(self, folder: RunFolder, stop: threading.Event, _: object) -> None:
        self._folder = folder

    def __enter__(self) -> PlayedEvaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:
        answer = type(self).play(command)
        if answer is not None:
            return answer
        requests = at_rate(read_windows(self._folder)[command.window], command.rate_factor)
        slo = parse_slo(command.slo)
        quality = self._quality(command.config)
        if command.guarded and broken_limits(slo, quality):
            return BrokeGuard(quality)
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
        metrics |= quality_entries(quality)
        self._folder.write_part(command.trial, records, [])
        return Measured(metrics)

    def probe(self, command: ProbeCommand) -> Probed | Failed:
        return type(self).probed

    def _quality(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        method = config["quantization"]
        if method not in type(self).kl:
            return None
        kl = type(self).kl[method]
        return {
            "variant": method,
            "quantization": method,
            "kl": kl,
            "kl_low": kl - 0.002,
            "kl_high": kl + 0.002,
            "quality_loss": kl / 2,
            "quality_loss_low": kl / 2 - 0.01,
            "quality_loss_high": kl / 2 + 0.01,
            "top1_agreement": 1 - kl,
        }


def play(evaluator: type[PlayedEvaluator], answer: Play) -> None:
    evaluator.play = staticmethod(answer)  # type: ignore[method-assign]
