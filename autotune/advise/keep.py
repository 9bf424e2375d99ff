"""Advice on disk, beside the profile that it follows from."""

from __future__ import annotations

import json
from pathlib import Path

from autotune.advise.advice import AdviceList
from autotune.diagnose.finding import Diagnosis
from autotune.errors import BadInput
from autotune.profiling.file import write_profile
from autotune.profiling.schema import Profile
from autotune.records import RunFolder


def keep_advice(path: Path, profile: Profile, diagnosis: Diagnosis, advice: AdviceList) -> bool:
    """Write `advice.json` and what it follows from into a folder; whether that was done.

    The advice that a search began with stays: its scoreboard is about that.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = RunFolder(path)
    try:
        kind = folder.read_run().get("kind")
    except BadInput:
        return False
    if kind not in ("profile", "bench") and folder.advice_json.exists():
        return False
    if not folder.profile_json.exists():
        write_profile(folder.profile_json, profile)
    folder.write_json(folder.diagnosis_json, diagnosis.to_json())
    folder.write_json(folder.advice_json, json.loads(json.dumps(advice.to_json())))
    return True
