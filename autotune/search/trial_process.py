"""The child in which trials run: holds the loaded engine, measures what it is told.

A crash, or the kernel's out-of-memory killer, ends this process and not the search. Trials that
differ only in `live` or `cache` knobs reuse the loaded weights.

Run as `python -m autotune.search.trial_process RUN_FOLDER`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from autotune.calibration_text import with_text_at_hand
from autotune.load.open_loop import run_load
from autotune.measure import at_rate, measure
from autotune.profiling.machine import calibrate_machine
from autotune.profiling.model_facts import model_facts
from autotune.quality import QualityMeter
from autotune.quality_guard import broken_limits, quality_entries
from autotune.records import RunFolder
from autotune.search.messages import (
    QUANTIZING,
    BrokeGuard,
    Command,
    Failed,
    Lacking,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
    Progress,
    Reply,
    decode,
    encode,
)
from autotune.search.windows import WindowReader
from autotune.slo import Slo, parse_slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, EngineError, EnvironmentLacks
from engine.loading import LoadedModel, load_model

_PR_SET_PDEATHSIG = 1
# A few requests run before each measurement, so that first-use costs (compilation, page faults,
# thread start) are not measured.
WARMUP_REQUESTS = 4


class TrialProcess:
    """Measures commands on one engine that is kept loaded between them."""

    def __init__(self, folder: RunFolder, replies: BinaryIO) -> None:
        self._folder = folder
        self._replies = replies
        self._windows = WindowReader(folder)
        self._quality = QualityMeter(folder.path)
        self._model: LoadedModel | None = None
        self._engine: Engine | None = None
        self._config: EngineConfig | None = None

    def serve(self, commands: BinaryIO) -> None:
        """Answer commands until their stream ends."""
        for line in commands:
            command = decode(line)
            if not isinstance(command, (MeasureCommand, ProbeCommand)):
                raise ValueError(f"not a command: {command}")
            self._reply(self._answer(command))

    def _reply(self, reply: Reply) -> None:
        self._replies.write(encode(reply))
        self._replies.flush()

    def _answer(self, command: Command) -> Reply:
        try:
            config = EngineConfig.from_mapping(command.config)
            config = with_text_at_hand(config, self._folder.path)
            engine = self._engine_for(config)
            if isinstance(command, ProbeCommand):
                return self._probe(config, command)
            # Before the load: it is cheaper, and where the guard breaks there is no load to pay.
            slo = parse_slo(command.slo)
            quality = self._quality_of(config, slo)
            if command.guarded and broken_limits(slo, quality):
                return BrokeGuard(quality)
            return self._measure(engine, config, command, slo, quality)
        except ConfigError as error:
            return Failed("rejected", str(error))
        except EnvironmentLacks as error:
            return Failed("out_of_memory", str(error))
        except EngineError as error:
            if self._model is not None and self._model.failure is not None:
                self._drop_engine()
                return Failed("crash", str(error))
            return Failed("rejected", str(error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # No fault of the configuration, so no trial may be counted against it.
            return Lacking(f"no space is left on the disk of {self._folder.path}")
        except MemoryError:
            self._drop_engine()
            return Failed("out_of_memory", "the process ran out of memory")
        except RuntimeError as error:
            # torch raises plain RuntimeErrors; the engine may be left half-way, so it is dropped.
            self._drop_engine()
            _end_with_a_lost_device()
            lines = str(error).splitlines() or [type(error).__name__]
            memory = "out of memory" in lines[0].lower() or "can't allocate" in lines[0].lower()
            return Failed("out_of_memory" if memory else "crash", lines[0][:500])

    def _engine_for(self, config: EngineConfig) -> Engine:
        if self._model is not None and self._model.failure is not None:
            self._drop_engine()  # a rank died: of the model nothing is left
        if self._engine is not None and self._config is not None:
            reload = self._config.reload_needed(config)
            if reload != "weights":
                changes = {
                    name: value
                    for name, value in config.to_dict().items()
                    if value != getattr(self._config, name)
                }
                # Remembered only once it took effect: a refused change leaves the engine as it was.
                if changes:
                    self._engine.reconfigure(**changes)
                self._config = config
                return self._engine
        self._drop_engine()
        self._reply(Progress("loading"))
        self._model = load_model(config, self._tell_of_layer)
        self._engine, self._config = self._model.engine(config), config
        return self._engine

    def _tell_of_layer(self, done: int, total: int) -> None:
        """Quantizing for the first time takes long; the search must not take it for a hang."""
        self._reply(Progress(QUANTIZING, done, total))

    def _drop_engine(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = self._engine = self._config = None
        gc.collect()

    def _quality_of(self, config: EngineConfig, slo: Slo) -> dict[str, Any] | None:
        assert self._model is not None
        self._reply(Progress("scoring the held-out text"))
        return self._quality.measure(self._model, config, load_reference=slo.needs_quality)

    def _probe(self, config: EngineConfig, command: ProbeCommand) -> Reply:
        assert self._model is not None
        try:
            calibration = calibrate_machine(
                self._model,
                config,
                model_facts(config),
                command.methods,
                command.cache_dtypes,
                budget_s=command.budget_s,
                say=lambda what: self._reply(Progress(what)),
            )
        except (ArithmeticError, LookupError, ValueError) as error:
            # Too short a time for a statistic, or the like: no reason to load the model again.
            return Failed("crash", f"{type(error).__name__}: {error}")
        return Probed(calibration.ceilings.model_dump(), calibration.probes.model_dump())

    def _measure(
        self,
        engine: Engine,
        config: EngineConfig,
        command: MeasureCommand,
        slo: Slo,
        quality: dict[str, Any] | None,
    ) -> Reply:
        requests = at_rate(self._windows.window(command.window), command.rate_factor)
        self._warm_up(engine, requests)
        engine.clear_prefix_cache()
        measurement = measure(
            engine,
            requests,
            slo=slo,
            config=config,
            drain_limit=command.drain_limit,
            seed=command.seed,
            on_progress=lambda done: self._reply(Progress("load", done.left, done.total)),
        )
        measurement.metrics.update(quality_entries(quality))
        self._folder.write_part(command.trial, measurement.records, measurement.steps)
        assert self._model is not None
        return Measured(measurement.metrics, list(self._model.notes))

    def _warm_up(self, engine: Engine, requests: Sequence[LoadRequest]) -> None:
        self._reply(Progress("warm-up"))
        run_load(engine, at_rate(requests[:WARMUP_REQUESTS], None), drain_limit=30.0)


def _end_with_a_lost_device() -> None:
    """End this process if its GPU does nothing for it any more, as after a bad address.

    Every further trial would fail here; the search starts another process, and tells the last line
    of this one.
    """
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"the GPU is of no more use to this process: {line}", file=sys.stderr, flush=True)
        os._exit(1)


def _die_with_parent() -> None:
    """Ask Linux to end this process when the search dies, whatever killed it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _be_first_to_be_killed() -> None:
    """Have the kernel's out-of-memory killer choose this process before the search."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def main() -> None:
    """Serve commands from standard input; replies go to what was standard output."""
    _die_with_parent()
    _be_first_to_be_killed()
    # Ctrl-C reaches the whole terminal; the search decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not fall between the replies.
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        TrialProcess(RunFolder(Path(sys.argv[1])), replies).serve(sys.stdin.buffer)


if __name__ == "__main__":
    main()
