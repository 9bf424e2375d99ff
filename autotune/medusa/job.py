"""One run of `autotune train-medusa`: text in, a folder of heads out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from autotune.embedded import HELD_OUT, TARGET
from autotune.errors import BadInput, Interrupted
from autotune.medusa.accuracy import Accuracy, judge
from autotune.medusa.learning import learn
from autotune.medusa.samples import Passage, Samples, cut_windows, take_samples, write_on
from autotune.output_folder import claim_output
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.kv_cache import kv_bytes_per_token
from engine.loading import DTYPES, LoadedModel, load_model
from engine.models.decoder import Decoder
from engine.models.registry import decoder_spec
from engine.quantize.calibration_text import SAMPLE
from engine.speculate.medusa_heads import MedusaHeads, MedusaWeights
from engine.speculate.medusa_learning import LearningHeads
from engine.speculate.medusa_writing import write_medusa

MINUTES = 5.0
# Of the time, so much at most is for the model to write what the heads learn from.
_WRITING_SHARE = 0.4
_WRITTEN_TOKENS = 131_072
_HELD_OUT_TOKENS = 8192
_TEXT_TOKENS = 262_144
_WINDOW = 256
_SEQUENCES = 64
_LEAST_STEPS = 50
MOST_HEADS, MOST_LAYERS = 16, 8


@dataclass(frozen=True, slots=True)
class TrainMedusaJob:
    """What is asked for; `model` and `out` are folders, `texts` files.

    Training takes `steps`, or without them `minutes` with all that comes before, once the model is
    loaded. Without texts the embedded model has its own. `own_output` gives each head an output
    projection: more of the tokens are right, and drafting reads that many times the vocabulary.
    """

    model: str
    out: Path
    texts: tuple[Path, ...] = ()
    num_heads: int = 4
    num_layers: int = 1
    own_output: bool = False
    minutes: float = MINUTES
    steps: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of it: heads that are right as often as `written` and `text` say.

    `written` is on what the model writes, which is what they draft; `text` on the text itself.
    """

    job: TrainMedusaJob
    steps: int
    samples: int
    seconds: float
    written: Accuracy
    text: Accuracy
    interrupted: bool

    def facts(self) -> dict[str, Any]:
        """What the folder's config.json says of the training."""
        return {
            "medusa_accuracy": {"written": self.written.to_json(), "text": self.text.to_json()},
            "medusa_training": {
                "steps": self.steps,
                "places": self.samples,
                "seconds": round(self.seconds, 1),
                "seed": self.job.seed,
                "interrupted": self.interrupted,
            },
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        job = self.job
        return {
            "folder": str(job.out),
            "model": job.model,
            "heads": job.num_heads,
            "layers": job.num_layers,
            "own_output": job.own_output,
            **self.facts(),
        }


class Listener(Protocol):
    """Hears how far the work is."""

    def __call__(self, stage: str, share: float, detail: str) -> None:
        """`share` of a stage is done, from 0 to 1; `detail` says how it goes."""


def train_medusa(
    job: TrainMedusaJob, *, listen: Listener, stop: threading.Event | None = None
) -> JobResult:
    """Train heads and write them.

    If `stop` is set while they learn, they are written as far as they came.

    Raises:
        BadInput: the job, a text or the folder cannot be used as asked.
        Interrupted: `stop` was set before anything was learned; nothing is written.
        EnvironmentMissing: the folder cannot be made.
        engine.errors.EngineError: the model cannot be used, or the machine lacks memory or disk.
    """
    _check(job)
    texts = _read_texts(job)
    config = _config(job)
    with claim_output(job.out), contextlib.closing(load_model(config)) as loaded:
        began = time.monotonic()
        try:
            return _train(job, loaded, config, texts, began, listen, stop)
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(
                f"training the heads does not fit the memory of {loaded.runner.decoder.device} "
                "beside the model: give fewer --heads or --layers, or leave --own-output out"
            ) from error


def _train(
    job: TrainMedusaJob,
    loaded: LoadedModel,
    config: EngineConfig,
    texts: Sequence[str],
    began: float,
    listen: Listener,
    stop: threading.Event | None,
) -> JobResult:
    clock = _Clock(job, began)
    decoder = loaded.runner.decoder
    if loaded.tokenizer is None:
        raise BadInput(
            f"{job.model} holds no tokenizer to read the text with: put its tokenizer.json there"
        )
    token_ids = [loaded.tokenizer.encode(text) for text in texts]
    length = loaded.runner.max_model_len
    windows, held_out = cut_windows(token_ids, length, _TEXT_TOKENS, job.seed)
    engine = loaded.engine(config)

    def write(what: Sequence[list[int]], most: int, seed: int) -> list[Passage]:
        return write_on(
            engine,
            what,
            most,
            seed,
            enough=lambda: clock.writing_is_over(),
            on_tokens=lambda count: listen(
                "the model writes", min(1.0, count / most), f"{count} of {most} tokens"
            ),
            stop=stop,
        )

    # First what the heads are judged by: it must be there even where time is short.
    written_held_out = write(held_out, min(_HELD_OUT_TOKENS, len(held_out) * length), job.seed + 1)
    written = write(windows, min(_WRITTEN_TOKENS, 8 * len(windows) * length), job.seed)
    listen("reading states", 0.0, "")
    count = job.num_heads
    samples = take_samples(decoder, [*written, *(Passage(w) for w in windows)], count)
    judged = take_samples(decoder, written_held_out, count)
    judged_text = take_samples(decoder, [Passage(window) for window in held_out], count)
    if stop is not None and stop.is_set():
        raise Interrupted("stopped before anything was learned")
    heads = LearningHeads(decoder, count, job.num_layers, own_output=job.own_output)
    clock.learning_begins()
    steps = learn(
        heads,
        samples,
        job.seed,
        done=clock.done,
        on_step=lambda step, losses: listen(
            "the heads learn", clock.done(step), f"step {step}, loss {sum(losses) / count:.3f}"
        ),
        stop=stop,
    )
    listen("judging", 0.0, "")
    weights = heads.snapshot()
    return _written(job, decoder, weights, judged, judged_text, steps, len(samples), began, stop)


def _written(
    job: TrainMedusaJob,
    decoder: Decoder,
    weights: MedusaWeights,
    judged: Samples,
    judged_text: Samples,
    steps: int,
    num_samples: int,
    began: float,
    stop: threading.Event | None,
) -> JobResult:
    heads = MedusaHeads(
        weights,
        decoder.dtype,
        decoder.device,
        None if job.own_output else decoder.head,
        soft_cap=decoder.spec.logit_soft_cap,
    )
    text = judge(heads, judged_text)
    # A model that ends its outputs at once writes nothing to judge by.
    own = judge(heads, judged) if len(judged) else text
    result = JobResult(
        job,
        steps,
        num_samples,
        time.monotonic() - began,
        own,
        text,
        interrupted=stop is not None and stop.is_set(),
    )
    weights = MedusaWeights(weights.heads, calibration=own.calibration)
    base = "embedded" if job.model == str(TARGET) else str(Path(job.model).expanduser().resolve())
    write_medusa(job.out, weights, decoder.spec, base, result.facts())
    return result


class _Clock:
    """When a job's parts are over: by minutes, or by steps."""

    def __init__(self, job: TrainMedusaJob, began: float) -> None:
        self._job = job
        self._began = began
        self._seconds = 60.0 * job.minutes
        self._learning = began

    def writing_is_over(self) -> bool:
        over = time.monotonic() - self._began > _WRITING_SHARE * self._seconds
        return self._job.steps is None and over

    def learning_begins(self) -> None:
        self._learning = time.monotonic()

    def done(self, step: int) -> float:
        """The share of learning that is over."""
        if self._job.steps is not None:
            return step / self._job.steps
        # Some steps in any case: heads that learned nothing are of no use.
        least = step / _LEAST_STEPS
        left = self._began + self._seconds - self._learning
        now = time.monotonic() - self._learning
        return min(least, now / left if left > 0 else 1.0)


def _check(job: TrainMedusaJob) -> None:
    for option, value, most in (
        ("--heads", job.num_heads, MOST_HEADS),
        ("--layers", job.num_layers, MOST_LAYERS),
    ):
        if not 1 <= value <= most:
            raise BadInput(f"{option} {value} must be from 1 to {most}")
    if job.steps is not None and job.steps < 1:
        raise BadInput(f"--steps {job.steps} must be at least 1")
    if not 0 < job.minutes < 1e6:
        raise BadInput(f"--minutes {job.minutes:g} must be above 0, for instance 5")


def _read_texts(job: TrainMedusaJob) -> list[str]:
    files = list(job.texts)
    if not files:
        if job.model != str(TARGET):
            raise BadInput(
                "--text is missing: give one or more files of text like what the model is asked "
                "for and answers"
            )
        files = [HELD_OUT, SAMPLE]
    return [_read_text(file.expanduser()) for file in files]


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--text {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--text {file} is not UTF-8 text: byte {error.start} is invalid") from error
    if not text.strip():
        raise BadInput(f"--text {file} is empty: give a file with text")
    return text


def _config(job: TrainMedusaJob) -> EngineConfig:
    """An engine for what is to be written, with a cache that leaves memory to the training."""
    spec = decoder_spec(open_model_folder(job.model))
    length = min(_WINDOW, spec.max_position)
    per_token = kv_bytes_per_token(spec, DTYPES[spec.checkpoint_dtype])
    return EngineConfig(
        model=job.model,
        device=job.device,
        max_model_len=length,
        max_num_seqs=_SEQUENCES,
        kv_cache_memory_bytes=2 * _SEQUENCES * length * per_token,
        seed=job.seed,
    )
