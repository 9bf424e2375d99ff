"""Steps as the lines of a least squares problem whose unknowns are the coefficients of a cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from autotune.predict.robust_fit import Floats, overhead_scale, robust_fit
from autotune.predict.step_cost import Coefficients, StepCost, StepWork
from engine.step_record import StepRecord

# The coefficients of device and host time, in the order of the columns.
DEVICE_TERMS = (
    "linear",
    "head",
    "decode_attention",
    "prefill_attention",
    "row",
    "sequence",
    "base",
    "chunk",
    "verify",
    "drafted",
)
HOST_TERMS = (
    "host_row",
    "host_sequence",
    "host_base",
    "host_chunk",
    "host_verify",
    "host_drafted",
)
TERMS = (*DEVICE_TERMS, *HOST_TERMS)
_FACTORS = 4  # of the device's terms, those that scale a probed part
# How far from 1 the factors of measured functions are expected.
FACTOR_SIGMA = 0.15
# Where the steps say less of a factor, something disturbed them or the probes. Above there is no
# limit: a part may be slower within a step, for want of a cache for instance.
LEAST_FACTOR = 0.5
_BASE, _CHUNK = DEVICE_TERMS.index("base"), DEVICE_TERMS.index("chunk")
# What steps that verify drafts take more, as shares of the shortest steps' seconds, where none was
# seen: of the device a tenth, and of the host as much again, as measured on two Xeon cores.
_VERIFY, _HOST_VERIFY = 0.1, 1.0
_LEAST = np.array([LEAST_FACTOR] * _FACTORS + [0.0] * (len(DEVICE_TERMS) - _FACTORS))
# How far from another method's fit a method's own lies: its factors, and its seconds as a share.
_KIN_FACTOR_SIGMA = 0.04
_KIN_SECONDS_SIGMA = 0.15


@dataclass(frozen=True, slots=True)
class FitLines:
    """One line a step: what `DEVICE_TERMS` are to be multiplied with, and the seconds it took.

    Of the device's columns those behind the factors are the host's too, in `HOST_TERMS`' order.
    `communication` are seconds in collectives, which are not among those of the device.
    """

    columns: Floats
    device: Floats
    host: Floats
    communication: Floats

    @classmethod
    def of(cls, probed: StepCost, steps: Sequence[StepRecord]) -> FitLines:
        """Lines of records."""
        communication = np.array([step.communication_seconds or 0.0 for step in steps])
        device = np.array([step.device_seconds for step in steps]) - communication
        # What drafting takes is a cost of its own.
        host = np.array([step.host_seconds - step.draft_seconds for step in steps])
        return cls(columns_of(probed, [StepWork.of(s) for s in steps]), device, host, communication)

    @classmethod
    def joined(cls, parts: Sequence[FitLines]) -> FitLines:
        """All lines of the parts, one part after another."""
        return cls(
            np.concatenate([part.columns for part in parts]),
            np.concatenate([part.device for part in parts]),
            np.concatenate([part.host for part in parts]),
            np.concatenate([part.communication for part in parts]),
        )

    @property
    def seconds(self) -> Floats:
        """Of each step in all."""
        return np.asarray(self.device + self.host + self.communication, dtype=float)

    @property
    def prompts(self) -> NDArray[np.bool_]:
        """Which steps have prompt chunks."""
        return np.asarray(self.columns[:, _CHUNK] > 0, dtype=bool)

    @property
    def sizes(self) -> Floats:
        """Rows of the steps."""
        return np.asarray(self.columns[:, _FACTORS], dtype=float)

    @property
    def host_columns(self) -> Floats:
        """What `HOST_TERMS` are to be multiplied with."""
        return self.columns[:, _FACTORS:]

    def taken(self, places: NDArray[np.intp] | NDArray[np.bool_]) -> FitLines:
        """The lines at some places."""
        return FitLines(
            self.columns[places],
            self.device[places],
            self.host[places],
            self.communication[places],
        )

    def slowed(self, factors: Floats) -> FitLines:
        """The same steps, each having taken so many times as long."""
        return FitLines(
            self.columns, self.device * factors, self.host * factors, self.communication * factors
        )

    def expected_device(self, coefficients: Coefficients) -> Floats:
        """Device seconds by the coefficients, without collectives."""
        values = np.array([getattr(coefficients, name) for name in DEVICE_TERMS])
        return np.asarray(self.columns @ values, dtype=float)

    def expected_host(self, coefficients: Coefficients) -> Floats:
        """Host seconds by the coefficients."""
        values = np.array([getattr(coefficients, name) for name in HOST_TERMS])
        return np.asarray(self.host_columns @ values, dtype=float)


def columns_of(probed: StepCost, works: Sequence[StepWork]) -> Floats:
    """What `DEVICE_TERMS` are to be multiplied with, [steps, terms]."""
    columns = np.array([_columns(probed, work) for work in works], dtype=float)
    return columns.reshape(-1, len(DEVICE_TERMS))


def _columns(cost: StepCost, work: StepWork) -> tuple[float, ...]:
    """Seconds by the probes of linear layers, head, attention of decodes and of prompts; counts."""
    decodes = cost.decode_attention.at(work.decode_sequences, work.decode_kv_tokens)
    return (
        cost.layers.at(work.rows),
        cost.head.at(work.sampled),
        decodes + cost.verification(work),
        cost.prefill_attention.at(work.prefill_pairs, work.prefill_kv_tokens, work.prompt_tokens),
        work.rows,
        work.sequences,
        1.0,
        work.prefill_sequences,
        1.0 if work.drafted else 0.0,
        work.drafted,
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """What is believed of the coefficients before steps are seen: means and their deviations."""

    device: Floats
    device_spread: Floats
    host: Floats
    host_spread: Floats

    @classmethod
    def of_probes(cls, lines: FitLines, row_scale: float) -> Expected:
        """The probes tell the truth, and overheads are a part of the shortest steps."""
        overhead, host = overhead_scale(lines.device), overhead_scale(lines.host)
        return cls(
            np.array([1.0] * _FACTORS + [0.0] * 4 + [_VERIFY * overhead, 0.0]),
            np.array(
                [FACTOR_SIGMA] * _FACTORS
                + [row_scale, overhead / 4, overhead, overhead / 2, _VERIFY * overhead, row_scale]
            ),
            host * np.array([0.0, 0.0, 0.0, 0.0, _HOST_VERIFY, 0.0]),
            host * np.array([1 / 16, 1 / 4, 1.0, 1.0, _HOST_VERIFY, 1 / 16]),
        )

    @classmethod
    def of_kin(cls, fitted: Coefficients) -> Expected:
        """Another method's coefficients hold as far as they do not hang on the method."""
        device = np.array([getattr(fitted, name) for name in DEVICE_TERMS])
        host = np.array([getattr(fitted, name) for name in HOST_TERMS])
        # What the other has nothing of may be there all the same.
        share = np.array([1e-3, 1e-2, 0.1, 0.1, 0.1, 1e-3])
        seconds = np.hypot(_KIN_SECONDS_SIGMA * device[_FACTORS:], share * device[_BASE])
        spread = np.concatenate([np.full(_FACTORS, _KIN_FACTOR_SIGMA), np.maximum(seconds, 1e-9)])
        host_spread = np.hypot(_KIN_SECONDS_SIGMA * host, share * host[_BASE - _FACTORS])
        return cls(device, spread, host, np.maximum(host_spread, 1e-9))


@dataclass(frozen=True, slots=True)
class CostFit:
    """Coefficients and how far they may be off together.

    `spread` [terms, terms] maps independent standard normal numbers to errors of the coefficients,
    in the order of `TERMS`.
    """

    coefficients: Coefficients
    spread: Floats

    @classmethod
    def believed(cls, expected: Expected, coefficients: Coefficients) -> CostFit:
        """What is expected where no step was seen."""
        spread = np.diag(np.concatenate([expected.device_spread, expected.host_spread]))
        return cls(coefficients, spread)

    def drawn(self, normal: Floats) -> Coefficients:
        """Coefficients that may be so; `normal` [terms] are standard normal numbers."""
        values = np.array([getattr(self.coefficients, name) for name in TERMS])
        drawn = np.maximum(values + self.spread @ normal, 0.0)
        drawn[:_FACTORS] = np.maximum(drawn[:_FACTORS], LEAST_FACTOR)
        named = dict(zip(TERMS, map(float, drawn), strict=True))
        return dataclasses.replace(self.coefficients, **named)


def fit_lines(lines: FitLines, expected: Expected) -> CostFit:
    """Fit the coefficients; what the steps do not tell is as `expected`."""
    device, device_spread = robust_fit(
        lines.columns, lines.device, expected.device, expected.device_spread, _LEAST
    )
    host, host_spread = robust_fit(
        lines.host_columns, lines.host, expected.host, expected.host_spread
    )
    row, base = 0.0, 0.0
    if lines.communication.any():
        both = lines.columns[:, [DEVICE_TERMS.index("row"), DEVICE_TERMS.index("base")]]
        scale = overhead_scale(lines.communication)
        spread = np.array([scale / 16, scale])
        row, base = robust_fit(both, lines.communication, np.zeros(2), spread)[0]
    named = dict(zip(TERMS, map(float, (*device, *host)), strict=True))
    return CostFit(
        Coefficients(**named, communication_row=float(row), communication_base=float(base)),
        np.asarray(block_diag(device_spread, host_spread), dtype=float),
    )
