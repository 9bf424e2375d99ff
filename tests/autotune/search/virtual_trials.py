"""An engine of known costs in virtual time, in place of the trial process: what it measures is what
a simulation under those costs says, so that the truth of every configuration is known."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from autotune.errors import Interrupted
from autotune.measure import at_rate
from autotune.metrics import compute_metrics
from autotune.predict.drafting import DraftProfile
from autotune.predict.fit import probed_cost
from autotune.predict.pace import Pace
from autotune.predict.replay import replay
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Ceilings, LinearProbe, Probes
from autotune.quality_guard import broken_limits, quality_entries
from autotune.records import RunFolder
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
from engine.engine import CacheShape
from tests.autotune.predict.played_profile import probes

CEILINGS = Ceilings(
    bandwidth=2e10,
    working_set_bandwidth=1e11,
    matmul={"bfloat16": 1e12},
    compute_dtype="bfloat16",
    ridge=10.0,
)
BLOCKS = 4096


def all_probes() -> Probes:
    """Of `played_profile`, and int4, which reads a third of floats' time and multiplies as they."""
    known = probes()
    floats = known.linears[0]
    int4 = LinearProbe(
        method="int4",
        rows=floats.rows,
        layers_s=[max(4e-3 / 3, s) if s <= 4e-3 else s for s in floats.layers_s],
        head_s=list(floats.head_s),
    )
    return known.model_copy(update={"linears": [*known.linears, int4]})


class VirtualTrials:
    """Measures by simulation.

    Args:
        path: the run folder.
        slower: factors on the time of steps by quantization, beyond what the probes say.
        fails: the answer of a failing configuration, None where it runs.
        most: trials before the user stops the run; None never stops it.
        kl: harm by quantization; without it none is measured.
        drafts: how they fare, by `speculative_method`.
    """

    def __init__(
        self,
        path: Path,
        *,
        slower: Mapping[str, float] | None = None,
        fails: Callable[[EngineConfig], Failed | None] = lambda _: None,
        most: int | None = None,
        kl: Mapping[str, float] | None = None,
        steps: bool = True,
        drafts: Mapping[str, DraftProfile] | None = None,
    ) -> None:
        self._folder = RunFolder(path)
        self._slower = slower or {}
        self._fails = fails
        self._left = most
        self._kl = kl or {}
        self._steps = steps
        self._drafts = drafts or {}
        self.stop = threading.Event()
        self.seconds = 0.0
        self.probed = 0

    def clock(self) -> float:
        """Virtual seconds."""
        return self.seconds

    def probe(self, command: ProbeCommand) -> Probed | Failed:
        """What parts of a step take, as `all_probes` has it."""
        self.probed += 1
        self.seconds += command.budget_s
        return Probed(CEILINGS.model_dump(), all_probes().model_dump())

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:
        """Play a trial and keep its records."""
        if self._left == 0:
            raise Interrupted("stopped")
        self._left = None if self._left is None else self._left - 1
        config = EngineConfig.from_mapping(command.config)
        self.seconds += 2.0
        failed = self._fails(config)
        if failed is not None:
            return failed
        slo = parse_slo(command.slo)
        quality = self._quality(config)
        if command.guarded and broken_limits(slo, quality):
            return BrokeGuard(quality)
        load = at_rate(read_windows(self._folder)[command.window], command.rate_factor)
        cost = probed_cost(all_probes(), config.quantization, config.kv_cache_dtype)
        played = replay(
            load,
            config,
            cost,
            CacheShape(BLOCKS, model_facts(config).max_model_len),
            drain_limit=command.drain_limit,
            # No two windows are quite alike.
            pace=Pace(mean=self._slower.get(config.quantization, 1.0) + 0.002 * command.window),
            drafts=self._drafts.get(config.speculative_method),
            keep_steps=True,
        )
        self.seconds += played.duration
        metrics = compute_metrics(
            played.records,
            slo,
            duration=played.duration,
            config=config,
            load_delivered=True,
            load_note=None,
            steps=played.steps,
            resamples=0,
        )
        metrics |= quality_entries(quality)
        self._folder.write_part(command.trial, played.records, played.steps if self._steps else [])
        return Measured(metrics)

    def _quality(self, config: EngineConfig) -> dict[str, object] | None:
        method = config.quantization
        if method not in self._kl:
            return None
        kl = self._kl[method]
        variant = {"variant": method, "quantization": method}
        return {
            **variant,
            **{f"kl{end}": kl for end in ("", "_low", "_high")},
            **{f"quality_loss{end}": kl for end in ("", "_low", "_high")},
            "top1_agreement": 1 - kl,
        }


def truth(
    evaluator: VirtualTrials, configs: list[EngineConfig], command: MeasureCommand
) -> list[dict[str, object]]:
    """What each configuration measures."""
    found = []
    for config in configs:
        reply = evaluator.measure(dataclasses.replace(command, config=config.to_dict()), 60.0)
        assert isinstance(reply, Measured)
        found.append(reply.metrics)
    return found
