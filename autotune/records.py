"""What was measured, as it lies on disk: one record a request, a step, a trial, a run.

Everything that reports or decides reads these records; nothing is measured twice. Times are
seconds. Files are written to a temporary name and renamed, except `trials.jsonl`, which only grows
and whose last line may be torn by a crash; a torn last line is dropped on reading.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from autotune.errors import BadInput
from engine.step_record import StepRecord

SCHEMA_VERSION = 1
# The tables of records that every trial writes.
_TABLES = ("requests", "steps")

Outcome = Literal["finished", "refused", "timed_out", "failed"]
TrialOutcome = Literal[
    "ok", "out_of_memory", "crash", "timeout", "rejected", "quality", "cut_short"
]
TrialKind = Literal["calibration", "search", "proof"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a load; times in seconds since the load began.

    `intended_send` is when the workload wanted it sent, `send` when the generator handed it over,
    `token_times` when each output token was there (the first is the first token, the last the
    finish). `input_tokens` and `output_tokens` are what was processed, `asked_output_tokens` what
    the workload asked for. A refused, failed or timed-out request has the reason in `reason` and
    is a miss of every limit. `first_scheduled` is when it first ran beside others, None if it
    never did or the engine does not tell. `output_token_ids` are the tokens that it got.
    """

    request_id: str
    intended_send: float
    send: float
    token_times: tuple[float, ...]
    input_tokens: int
    output_tokens: int
    asked_output_tokens: int
    outcome: Outcome
    reason: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    session_id: str | None = None
    first_scheduled: float | None = None
    output_token_ids: tuple[int, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether the request got its whole answer."""
        return self.outcome == "finished"

    @property
    def ttft(self) -> float | None:
        """Time to first token, from the intended send, in seconds."""
        return self.token_times[0] - self.intended_send if self.token_times else None

    @property
    def e2e(self) -> float | None:
        """Time from the intended send to the last token, in seconds."""
        return self.token_times[-1] - self.intended_send if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1) in seconds; undefined for a single token."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


@dataclass(frozen=True, slots=True)
class LimitResult:
    """How one limit of the SLO fared; `violation` is measured/bound - 1 signed so that <= 0 is met.

    `measured` is None where nothing could be measured (no request finished): that is a violation.
    """

    limit: str
    measured: float | None
    bound: float
    met: bool
    violation: float


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One measurement of one configuration under the workload: a line of `trials.jsonl`.

    `metrics` has the keys of `bench --json`; it is None when the trial failed. `objective` is None
    when nothing could be measured. `quality` is the harm of the config's quantization, where it was
    measured; with the outcome `quality` it broke a limit of the SLO, so that no load was offered:
    `slo` then holds the limits on the quality alone. With the outcome `cut_short` a short load
    showed that it is hopeless: `metrics` are of that load and there is no objective. `round` is the
    repetition within the proof. `rate` is the mean offered load in requests per second; with the
    capacity objective the highest rate that met the SLO, whose metrics these are. `predicted` is
    what the trial was expected to measure before it ran: `metrics` and `objective` as {"value",
    "low", "high"} with the central 90%, `p_meets_slo`, and `after_trials`, how many search trials
    were known.
    """

    number: int
    kind: TrialKind
    source: str
    config: dict[str, Any]
    outcome: TrialOutcome
    seconds: float
    started_at: str
    reason: str | None = None
    rate: float | None = None
    seed: int = 0
    round: int = 0
    metrics: dict[str, Any] | None = None
    slo: list[LimitResult] = field(default_factory=list)
    slo_met: bool = False
    objective: float | None = None
    quality: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None

    @property
    def missed(self) -> float:
        """By how much the limits of the SLO were missed, added up; 0 if none was."""
        return sum(max(0.0, result.violation) for result in self.slo)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TrialRecord:
        """Read a line written by `to_json`.

        Raises:
            ValueError: the line is not such a record.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        try:
            data["slo"] = [LimitResult(**item) for item in data.get("slo", ())]
            return cls(**data)
        except TypeError as error:
            raise ValueError(str(error)) from error


class RunFolder:
    """The folder of one run: its paths, and how its records are written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_json = path / "run.json"
        self.trials_jsonl = path / "trials.jsonl"
        self.journal = path / "study.journal"
        self.requests_parquet = path / "requests.parquet"
        self.steps_parquet = path / "steps.parquet"
        self.report_html = path / "report.html"
        self.deploy = path / "deploy"
        self.profile_json = path / "profile.json"
        self.diagnosis_json = path / "diagnosis.json"
        self.advice_json = path / "advice.json"
        self.machine_json = path / "machine.json"
        self.plan_json = path / "plan.json"
        self.lock = path / "autotune.lock"
        self.parts = path / "parts"

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON file of this folder whole or not at all."""
        write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read_run(self) -> dict[str, Any]:
        """The content of `run.json`.

        Raises:
            BadInput: the folder holds no run, or one of another schema.
        """
        return _read_versioned(self.run_json, "run")

    def read_plan(self) -> dict[str, Any]:
        """The content of `plan.json`.

        Raises:
            BadInput: the folder holds no plan, or one of another schema.
        """
        return _read_versioned(self.plan_json, "plan")

    def append_trial(self, trial: TrialRecord) -> None:
        """Add a line to `trials.jsonl` and wait until it is on disk."""
        with self.trials_jsonl.open("a+b") as file:
            # A crash may have torn the last line; start a fresh one so that only that is lost.
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(trial.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read_trials(self) -> list[TrialRecord]:
        """The trials that ended, in the order in which they did; torn lines are left out."""
        try:
            lines = self.trials_jsonl.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        trials = []
        for line in lines:
            try:
                trials.append(TrialRecord.from_json(line))
            except ValueError:
                continue
        return trials

    def write_part(
        self, trial: int, requests: Sequence[RequestRecord], steps: Sequence[StepRecord]
    ) -> None:
        """Put one trial's records on disk at once; `merge_parts` joins them at the end."""
        self.parts.mkdir(exist_ok=True)
        _write_parquet(self._part(trial, "requests"), trial, requests)
        _write_parquet(self._part(trial, "steps"), trial, steps)

    def set_part_aside(self, trial: int) -> None:
        """Keep the trial's records as they are now, whatever is written for it afterwards."""
        for name in _TABLES:
            self._part(trial, name).replace(self._part_aside(trial, name))

    def take_part_back(self, trial: int) -> None:
        """Make the records that were set aside the trial's records again."""
        for name in _TABLES:
            self._part_aside(trial, name).replace(self._part(trial, name))

    def merge_parts(self) -> None:
        """Join the trials' parts into `requests.parquet` and `steps.parquet`; parts go away."""
        if not self.parts.is_dir():
            return
        for name, target in (("requests", self.requests_parquet), ("steps", self.steps_parquet)):
            paths = sorted(self.parts.glob(f"*.{name}.parquet"))
            tables = [pq.read_table(target)] if target.exists() else []
            done = {t for table in tables for t in table.column("trial").unique().to_pylist()}
            tables += [pq.read_table(p) for p in paths if int(p.name.split(".")[0]) not in done]
            if tables:
                _replace_table(target, pa.concat_tables(tables, promote_options="default"))
        # With the parts goes what a crash may have left half-written beside them.
        for path in self.parts.iterdir():
            path.unlink()
        self.parts.rmdir()

    def read_requests(self, trial: int) -> list[RequestRecord]:
        """The request records of one trial, in the order of their intended send."""
        rows = self._rows("requests", self.requests_parquet, trial)
        names = [f.name for f in dataclasses.fields(RequestRecord)]
        lists = ("token_times", "output_token_ids")
        records = []
        for row in rows:
            # Records of an earlier release lack what has a default.
            values = {name: row[name] for name in names if name in row}
            values |= {name: tuple(row.get(name) or ()) for name in lists}
            records.append(RequestRecord(**values))
        return sorted(records, key=lambda r: (r.intended_send, r.request_id))

    def read_steps(self, trial: int) -> list[StepRecord]:
        """The step records of one trial, in time."""
        rows = self._rows("steps", self.steps_parquet, trial)
        return sorted((_step(row) for row in rows), key=lambda s: s.start)

    def _part(self, trial: int, name: str) -> Path:
        return self.parts / f"{trial:05d}.{name}.parquet"

    def _part_aside(self, trial: int, name: str) -> Path:
        return self.parts / f".{trial:05d}.{name}.aside"

    def _rows(self, name: str, merged: Path, trial: int) -> list[dict[str, Any]]:
        part = self._part(trial, name)
        path = part if part.exists() else merged
        if not path.exists():
            return []
        rows: list[dict[str, Any]] = pq.read_table(
            path, filters=[("trial", "=", trial)]
        ).to_pylist()
        return rows


def utc_now() -> str:
    """This moment as records tell it: ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a report is meant to be passed on.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_versioned(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent} holds no {kind}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"{path} has schema version {version!r}; this release reads {SCHEMA_VERSION}"
        )
    return dict(content)


_REQUEST_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("request_id", pa.string()),
        ("intended_send", pa.float64()),
        ("send", pa.float64()),
        ("token_times", pa.list_(pa.float64())),
        ("input_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("asked_output_tokens", pa.int32()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("cached_tokens", pa.int32()),
        ("preemptions", pa.int32()),
        ("session_id", pa.string()),
        ("first_scheduled", pa.float64()),
        ("output_token_ids", pa.list_(pa.int32())),
    ]
)
_STEP_FIELDS = dataclasses.fields(StepRecord)
_STEP_NAMES = tuple(f.name for f in _STEP_FIELDS)
_STEP_LISTS = frozenset(f.name for f in _STEP_FIELDS if "tuple" in str(f.type))
_STEP_OPTIONALS = frozenset(f.name for f in _STEP_FIELDS if "None" in str(f.type))


def _step_type(entry: dataclasses.Field[Any]) -> pa.DataType:
    if entry.name in _STEP_LISTS:
        return pa.list_(pa.int32())
    return pa.float64() if "float" in str(entry.type) else pa.int64()


_STEP_SCHEMA = pa.schema(
    [("trial", pa.int32())] + [(entry.name, _step_type(entry)) for entry in _STEP_FIELDS]
)


def _step(row: Mapping[str, Any]) -> StepRecord:
    """A row of `steps.parquet`; what a record of an earlier release lacks has its default.

    Beside newer rows in one file, what it lacks is null.
    """
    values: dict[str, Any] = {}
    for name in _STEP_NAMES:
        value = row.get(name)
        if value is not None:
            values[name] = tuple(value) if name in _STEP_LISTS else value
        elif name in row and name in _STEP_OPTIONALS:
            values[name] = None
    return StepRecord(**values)


def _write_parquet(
    path: Path, trial: int, records: Iterable[RequestRecord] | Iterable[StepRecord]
) -> None:
    rows = [{"trial": trial, **dataclasses.asdict(record)} for record in records]
    schema = _REQUEST_SCHEMA if ".requests." in path.name else _STEP_SCHEMA
    _replace_table(path, pa.Table.from_pylist(rows, schema=schema))


def _replace_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
