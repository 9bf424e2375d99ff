"""`calibration.json`: a calibration on disk, written whole or not at all, checked when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from autotune.errors import BadInput
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_fit import LoadFits, MethodFit
from autotune.predict.calibration_sample import LoadSample
from autotune.predict.fit_lines import TERMS, CostFit
from autotune.predict.load_times import LoadTimes
from autotune.predict.residual import Residual
from autotune.predict.step_cost import Coefficients, StepWork
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import Ceilings, ModelFacts, Probes
from autotune.records import write_atomically
from engine.config import EngineConfig
from engine.errors import EngineError

CALIBRATION_VERSION = 2
CALIBRATION_NAME = "calibration.json"
# Digits that are kept of a measured second.
_DIGITS = 6


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _MethodPart(_Part):
    quantization: str
    kv_cache_dtype: str
    coefficients: dict[str, float]
    spread: list[list[float]]
    steps: int
    median_error: float
    p90_error: float
    level_error: float


class _ResidualPart(_Part):
    decode_knots: list[float]
    decode_factors: list[float]
    prompt_knots: list[float]
    prompt_factors: list[float]


class _SamplePart(_Part):
    config: dict[str, Any]
    kind: Literal["sweep", "load"]
    every: float
    works: list[list[float]]
    starts: list[float]
    device: list[float]
    host: list[float]
    communication: list[float]
    gaps: list[tuple[int, float]]
    waits: list[float]
    blocks_total: int


class _TimesPart(_Part):
    gap: float
    arrival: float
    gap_sequence: float


class _CalibrationFile(_Part):
    calibration_version: int
    engine_version: str
    created_at: str
    hardware: dict[str, Any]
    config: dict[str, Any]
    model: ModelFacts
    ceilings: Ceilings
    probes: Probes
    methods: list[_MethodPart]
    residual: _ResidualPart
    pace: float
    drift: float
    level: float
    decode_error: float
    prompt_error: float
    moments: list[float]
    times: _TimesPart
    samples: list[_SamplePart]


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration to a file."""
    content = _to_file(calibration).model_dump_json()
    write_atomically(path, (content + "\n").encode())


def read_calibration(path: Path) -> Calibration:
    """Read a calibration, from its file or the folder that holds one.

    Raises:
        BadInput: there is none, it is of another version of the format, or it is no calibration.
    """
    file = path / CALIBRATION_NAME if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{file} does not exist: autotune simulate --calibration takes what it wrote before, "
            "or the folder of a run or a profile"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as a calibration: {error}") from error
    version = raw.get("calibration_version") if isinstance(raw, dict) else None
    if version != CALIBRATION_VERSION:
        raise BadInput(
            f"{file} has calibration version {version!r}; this release reads "
            f"{CALIBRATION_VERSION}: calibrate again with autotune simulate --recalibrate"
        )
    try:
        return _from_file(_CalibrationFile.model_validate(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{file}: {where or 'it'} is not valid: {first['msg']}") from None
    except (EngineError, ValueError, TypeError) as error:
        raise BadInput(f"{file} is not a valid calibration: {error}") from None


def _to_file(calibration: Calibration) -> _CalibrationFile:
    fits, residual, times = calibration.fits, calibration.fits.residual, calibration.times
    return _CalibrationFile(
        calibration_version=CALIBRATION_VERSION,
        engine_version=calibration.engine_version,
        created_at=calibration.created_at,
        hardware=dict(calibration.hardware),
        config=calibration.config.to_dict(),
        model=calibration.model,
        ceilings=calibration.machine.ceilings,
        probes=calibration.machine.probes,
        methods=[
            _MethodPart(
                quantization=method[0],
                kv_cache_dtype=method[1],
                coefficients={
                    name: getattr(fit.fit.coefficients, name)
                    for name in Coefficients.__dataclass_fields__
                },
                spread=fit.fit.spread.tolist(),
                steps=fit.steps,
                median_error=fit.median_error,
                p90_error=fit.p90_error,
                level_error=fit.level_error,
            )
            for method, fit in fits.methods.items()
        ],
        residual=_ResidualPart(
            decode_knots=list(residual.decode_knots),
            decode_factors=list(residual.decode_factors),
            prompt_knots=list(residual.prompt_knots),
            prompt_factors=list(residual.prompt_factors),
        ),
        pace=fits.pace,
        drift=fits.drift,
        level=fits.level,
        decode_error=fits.decode_error,
        prompt_error=fits.prompt_error,
        moments=_rounded(fits.moments),
        times=_TimesPart(gap=times.gap, arrival=times.arrival, gap_sequence=times.gap_sequence),
        samples=[_sample_part(sample) for sample in calibration.samples],
    )


def _sample_part(sample: LoadSample) -> _SamplePart:
    return _SamplePart(
        config=sample.config.to_dict(),
        kind=sample.kind,
        every=sample.every,
        works=[list(map(float, work)) for work in sample.works],
        starts=_rounded(sample.starts),
        device=_rounded(sample.device),
        host=_rounded(sample.host),
        communication=_rounded(sample.communication),
        gaps=[(count, _round(gap)) for count, gap in sample.gaps],
        waits=_rounded(sample.waits),
        blocks_total=sample.blocks_total,
    )


def _from_file(content: _CalibrationFile) -> Calibration:
    methods = {}
    for part in content.methods:
        spread = np.array(part.spread, dtype=float)
        if spread.shape != (len(TERMS), len(TERMS)):
            raise ValueError(f"spread of {part.quantization} must have {len(TERMS)} x {len(TERMS)}")
        methods[part.quantization, part.kv_cache_dtype] = MethodFit(
            fit=CostFit(Coefficients(**part.coefficients), spread),
            steps=part.steps,
            median_error=part.median_error,
            p90_error=part.p90_error,
            level_error=part.level_error,
        )
    if not methods or not content.samples:
        raise ValueError("it holds no measured method")
    residual = content.residual
    return Calibration(
        config=EngineConfig.from_mapping(content.config),
        model=content.model,
        machine=MachineCalibration(content.ceilings, content.probes),
        hardware=content.hardware,
        engine_version=content.engine_version,
        samples=tuple(_sample(part) for part in content.samples),
        fits=LoadFits(
            methods,
            Residual(
                _matching(residual.decode_knots, residual.decode_factors),
                tuple(residual.decode_factors),
                _matching(residual.prompt_knots, residual.prompt_factors),
                tuple(residual.prompt_factors),
            ),
            content.pace,
            content.drift,
            content.level,
            content.decode_error,
            content.prompt_error,
            tuple(content.moments),
        ),
        times=LoadTimes(content.times.gap, content.times.arrival, content.times.gap_sequence),
        created_at=content.created_at,
    )


def _matching(knots: list[float], logs: list[float]) -> tuple[float, ...]:
    if len(knots) != len(logs) or knots != sorted(knots):
        raise ValueError("knots of the residual must rise, with one value each")
    return tuple(knots)


def _sample(part: _SamplePart) -> LoadSample:
    count = len(part.works)
    columns = (part.starts, part.device, part.host, part.communication)
    if not count or any(len(column) != count for column in columns):
        raise ValueError("a sample must have as many seconds as steps, and at least one")
    return LoadSample(
        config=EngineConfig.from_mapping(part.config),
        kind=part.kind,
        every=part.every,
        works=tuple(_work(work) for work in part.works),
        starts=np.array(part.starts),
        device=np.array(part.device),
        host=np.array(part.host),
        communication=np.array(part.communication),
        gaps=tuple(part.gaps),
        waits=tuple(part.waits),
        blocks_total=part.blocks_total,
    )


def _work(values: Sequence[float]) -> StepWork:
    rows, prefills, decodes, *rest = values
    return StepWork(rows, int(prefills), int(decodes), *rest)


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _rounded(values: Iterable[float]) -> list[float]:
    return [_round(float(value)) for value in values]
