"""What a profile and its diagnosis could not tell, each reason once."""

from __future__ import annotations

from autotune.diagnose.finding import Diagnosis
from autotune.profiling.enough import shortage, told_once
from autotune.profiling.schema import Profile


def not_known(profile: Profile, diagnosis: Diagnosis) -> list[str]:
    """Sentences for the reader: what the profile lacks, and what was not judged beside that."""
    reasons = tuple(shortage(text) or text.rstrip(".") for text in profile.partial)
    unjudged = [text for text in diagnosis.unjudged if not (reasons and text.endswith(reasons))]
    return list(dict.fromkeys([*told_once(profile.partial), *unjudged]))
