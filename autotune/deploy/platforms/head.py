"""The comments at the top of a platform's file."""

from __future__ import annotations

from autotune.deploy.evidence import Evidence
from autotune.deploy.platforms.carried import Carried
from autotune.deploy.platforms.versions import platform
from autotune.deploy.translation_notes import why_left_out


def head(
    target: str,
    title: str,
    carried: Carried,
    evidence: Evidence,
    *,
    use: str,
    evidence_in: str = "",
    more: tuple[str, ...] = (),
) -> list[str]:
    """What the file is, how to use it, what was measured, what is lost: one comment an entry.

    Arguments:
        target: the platform, as `versions.yaml` calls it.
        title: what the file is.
        carried: the engine in it.
        evidence: what was measured.
        use: the command that uses it.
        evidence_in: the file that has the measurements, if this one is not to repeat them.
        more: further warnings.
    """
    known = platform(target)
    lines = [
        f"{title}, running {carried.title}. Use: {use}",
        f"Written for {known.release}; checked against {known.checked}.",
        *(f"WARNING: {warning}." for warning in (*carried.warnings, *more)),
    ]
    if evidence_in:
        lines.append(f"What was measured and why each value was chosen stands in {evidence_in}.")
    else:
        lines += ["", *evidence.summary]
    if carried.capacity is not None:
        lines.append(f"Capacity of a replica: {carried.capacity.basis}.")
    if carried.lost and not evidence_in:
        lines += ["", f"Not carried over: {carried.title} has no such setting."]
        lines += [why_left_out(left, evidence) for left in carried.lost]
    return [*lines, ""]
