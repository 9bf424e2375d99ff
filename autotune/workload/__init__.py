"""What users send: rows read from traces or drawn from presets, scaled, and made into requests."""

from autotune.workload.arrivals import spread_grid
from autotune.workload.describe import describe
from autotune.workload.materialise import LoadRequest, materialise, tokenise
from autotune.workload.presets import PRESETS, make_preset
from autotune.workload.read import read_workload
from autotune.workload.rows import Workload, WorkloadRow
from autotune.workload.transform import (
    clip_lengths,
    repeat_workload,
    scale_lengths,
    scale_rate,
    slice_workload,
)

__all__ = [
    "PRESETS",
    "LoadRequest",
    "Workload",
    "WorkloadRow",
    "clip_lengths",
    "describe",
    "make_preset",
    "materialise",
    "read_workload",
    "repeat_workload",
    "scale_lengths",
    "scale_rate",
    "slice_workload",
    "spread_grid",
    "tokenise",
]
