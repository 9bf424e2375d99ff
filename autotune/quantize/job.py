"""One run of `autotune quantize`: its folder, its text, the checkpoint and the quality report."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.model_info import read_model_info
from autotune.quantize.report import write_report
from autotune.quantize.score import measure_quality
from autotune.workload.read import read_workload
from engine.checkpoints.model_folder import ModelFolder, open_model_folder
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.loading import resolve_device
from engine.models.registry import decoder_spec
from engine.quantize.calibration_text import read_calibration_text
from engine.quantize.options import WriteOptions
from engine.quantize.shard_writer import PROGRESS_FILE, forget_progress
from engine.quantize.write_checkpoint import (
    OnLayer,
    Stopped,
    Written,
    check_quantizable,
    write_checkpoint,
)

_BUSY_FILE = ".busy"
_LEAST_TEXT = 1000
SPARSITY_COST = (
    "2:4 sparsity has set half of the weights of every pruned layer to zero. They are stored like "
    "all others, so that it saves no memory, and no matmul of this engine is faster for it; its "
    "price is part of the measured loss"
)
HEAD_NOTE = "the output head and the embeddings stay in floats, as checkpoints of this format do"
EXPERTS_NOTE = (
    "transformers (tried: 5.23) has no reader for experts in plain int8; integers in groups load "
    "there (--method rtn --bits 8 --group-size 64)"
)
ASYMMETRIC_NOTE = (
    "asymmetric groups: transformers (tried: 5.23 with compressed-tensors 0.20) loads them only "
    "with quantization_config=CompressedTensorsConfig(dequantize=True)"
)


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What is asked for; `model` and `out` are folders.

    Calibration reads the file `calibration`, or the prompts of the file `workload`, or the built-in
    sample. `quality` measures the result on the held-out text.
    """

    model: str
    out: Path
    options: WriteOptions
    calibration: Path | None = None
    workload: Path | None = None
    workload_format: str | None = None
    device: str = "auto"
    quality: bool = True
    resume: bool = False


@dataclass(slots=True)
class JobResult:
    """What came of it: `quality` as `autotune.quality` tells it, None where it was not measured."""

    written: Written
    seconds: float
    quality: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        written = self.written
        return {
            "checkpoint": str(written.folder),
            "description": written.options.describe(),
            **{
                name: value
                for name, value in written.options.to_json().items()
                if name != "calibration_tokens"
            },
            "calibration_tokens": written.calibration_tokens,
            "source_bytes": written.source_bytes,
            "written_bytes": written.written_bytes,
            "content_key": written.key.digest,
            "seconds": self.seconds,
            "quality": self.quality,
            "notes": self.notes,
        }


def quantize_model(
    job: QuantizeJob,
    *,
    on_layer: OnLayer | None = None,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> JobResult:
    """Quantize, measure and report.

    Raises:
        BadInput: a folder or a file that cannot be used as asked.
        Interrupted: `stop` was set; finished layers are in the folder.
        EnvironmentMissing: another process works in the folder, or it cannot be written.
        engine.errors.EngineError: the model or the options cannot be used, or the machine lacks
            memory or disk.
    """
    began = time.monotonic()
    folder = open_model_folder(job.model)
    options = check_quantizable(folder, job.options)
    _check_experts(folder, options)
    text = _text(job) if options.calibrated else ""
    config = EngineConfig(model=job.model, device=job.device)
    device = resolve_device(config)
    _check_out(job)
    with _claimed(job.out):
        try:
            written = write_checkpoint(
                folder, options, text, job.out, device=device, on_layer=on_layer, stop=stop
            )
        except Stopped:
            raise Interrupted(f"stopped; finished layers are kept in {job.out}") from None
        has_experts = decoder_spec(folder).experts is not None
        notes = [*written.notes, *_standing_notes(written.options, has_experts)]
        quality = None
        if job.quality:
            say("measuring the quality: the original")
            try:
                quality = measure_quality(config, job.out, say, stop)
            except (EnvironmentLacks, MemoryError) as error:
                notes.append(f"the quality was not measured: {error or 'memory does not suffice'}")
            if quality is None and stop is not None and stop.is_set():
                raise Interrupted(f"stopped; the checkpoint in {job.out} lacks its quality report")
        if job.quality and quality is None and not notes[-1].startswith("the quality"):
            notes.append("the quality was not measured: the model has no tokenizer")
        result = JobResult(written, time.monotonic() - began, quality, notes)
        write_report(job.out, read_model_info(config).name, result.to_json())
        forget_progress(job.out)
        return result


def _check_experts(folder: ModelFolder, options: WriteOptions) -> None:
    if options.weight_only and not options.symmetric and decoder_spec(folder).experts is not None:
        raise BadInput(
            "--asymmetric is not possible for a model with experts: transformers drops the zeros "
            "of experts when it loads them; use --symmetric"
        )


def _text(job: QuantizeJob) -> str:
    if job.calibration is not None and job.workload is not None:
        raise BadInput("--calibration and --workload both name the text to calibrate on: give one")
    if job.workload is None:
        return read_calibration_text(job.calibration)
    workload = read_workload(job.workload, job.workload_format)
    text = "\n\n".join(row.prompt for row in workload.rows if row.prompt)
    if len(text) < _LEAST_TEXT:
        raise BadInput(
            f"workload {job.workload} holds {len(text)} characters of prompts, too few to "
            "calibrate on: give a trace with texts, or a text file with --calibration"
        )
    return text


def _standing_notes(options: WriteOptions, has_experts: bool) -> list[str]:
    notes = [HEAD_NOTE]
    if has_experts and not options.weight_only and options.method in ("rtn", "smoothquant"):
        notes.append(EXPERTS_NOTE)
    if options.weight_only and not options.symmetric:
        notes.append(ASYMMETRIC_NOTE)
    if options.sparsity != "none":
        notes.append(SPARSITY_COST)
    return notes


def _check_out(job: QuantizeJob) -> None:
    """An output folder is new or empty, or with --resume one that was begun."""
    begun = (job.out / PROGRESS_FILE).is_file()
    if job.resume and not begun:
        finished = (job.out / "config.json").is_file()
        raise BadInput(
            f"{job.out} holds "
            + ("a finished checkpoint: there is nothing to go on with" if finished else "nothing")
            + ("" if finished else " to go on with: leave --resume out to begin")
        )
    if job.resume or not job.out.exists():
        return
    if not job.out.is_dir():
        raise BadInput(f"output folder {job.out} is a file: choose another with -o")
    if any(entry.name != _BUSY_FILE for entry in job.out.iterdir()):
        raise BadInput(
            f"output folder {job.out} exists and is not empty: choose another with -o"
            + (", or go on with what was begun in it with --resume" if begun else "")
        )


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the folder against other processes; it goes away again if nothing was put into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / _BUSY_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise EnvironmentMissing(f"output folder {out} cannot be used: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another process is working in {out}: wait for it to end") from None
        try:
            yield
        finally:
            (out / _BUSY_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()  # only if it is empty
    finally:
        os.close(handle)
