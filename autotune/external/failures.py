"""Why a serving engine did not start or went away: classes that a search can learn from."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from autotune.errors import AutotuneError

# host_memory and device_memory: it ran out of the one or the other.
# bad_flag: it refused the flags, or the table says that it would.
# model_not_found, port_in_use: nothing to do with the values of a trial.
FailureKind = Literal[
    "host_memory",
    "device_memory",
    "bad_flag",
    "model_not_found",
    "port_in_use",
    "crash",
    "timeout",
]
# What a server that has served cannot have ended by, whatever its log says of its start.
_OF_STARTS: tuple[FailureKind, ...] = ("bad_flag", "model_not_found", "port_in_use")
# A sentence of a log may hold a whole traceback's text.
_LONGEST = 300


class FailurePattern(BaseModel):
    """One sign of a failure in the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FailureKind
    pattern: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong: `reason` is one sentence; `exit_status` as a shell or `Popen` has it.

    `log_tail` are the last lines that the engine wrote.
    """

    kind: FailureKind
    reason: str
    exit_status: int | None = None
    log_tail: tuple[str, ...] = ()


class LaunchFailed(AutotuneError):
    """The engine did not come to serve; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def classify(
    title: str,
    patterns: Sequence[FailurePattern],
    exit_status: int | None,
    log: Sequence[str],
    *,
    on_device: bool,
    has_served: bool = False,
    killed_for_memory: bool = False,
) -> Failure:
    """The failure of an engine that ended by itself.

    Arguments:
        title: the engine's name in sentences.
        patterns: the table's, in order: the first that is seen decides.
        exit_status: as `Popen.returncode`: -N is the signal N; None if it is not known.
        log: its lines.
        on_device: it runs on a GPU; without one, device memory is the machine's.
        has_served: its start went well.
        killed_for_memory: the kernel has killed a process for memory meanwhile.
    """
    tail = tuple(log[-40:])
    for pattern in patterns:
        kind = pattern.kind
        line = _line(pattern.pattern, log)
        if line is None or (has_served and kind in _OF_STARTS):
            continue
        if kind == "device_memory" and not on_device:
            kind = "host_memory"
        return Failure(kind, f"{title}: {line}", exit_status, tail)
    if killed_for_memory or exit_status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        evidence = (
            "while the kernel killed a process for lack of memory"
            if killed_for_memory
            else "as the kernel does when memory runs out"
        )
        reason = f"{title} ended with {_how(exit_status)}, {evidence}"
        return Failure("host_memory", reason, exit_status, tail)
    last = last_error(log)
    reason = f"{title} ended with {_how(exit_status)}" + (f": {last}" if last else "")
    return Failure("crash", reason, exit_status, tail)


def _line(pattern: str, log: Sequence[str]) -> str | None:
    """The last line with the pattern, from where the pattern begins."""
    for line in reversed(log):
        if found := re.search(pattern, line):
            return line[found.start() :].strip()[:_LONGEST]
    return None


def last_error(log: Sequence[str]) -> str | None:
    """The last line that looks like an error's message, or the last that says anything."""
    written = [line.strip() for line in log if line.strip()]
    for line in reversed(written):
        if re.search(r"\b\w*(Error|Exception)\b\s*:|\berror:|[Ff]atal", line):
            return line[-_LONGEST:]
    return written[-1][-_LONGEST:] if written else None


def _how(exit_status: int | None) -> str:
    if exit_status is None:
        return "an unknown status"
    if exit_status < 0:
        try:
            return f"the signal {signal.Signals(-exit_status).name}"
        except ValueError:
            return f"the signal {-exit_status}"
    return f"the exit status {exit_status}"
