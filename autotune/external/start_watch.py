"""What the log of an engine that starts says: where it is, and what it came to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from autotune.external.server_log import ServerLog
from autotune.external.table import EngineTable


class StartWatch:
    """Follows a start by its log.

    Args:
        table: the engine's, with the patterns of its stages and facts.
        log: of this start.
        say: told each new stage.
    """

    def __init__(self, table: EngineTable, log: ServerLog, say: Callable[[str], None]) -> None:
        self._table = table
        self._log = log
        self._say = say
        self._stages = [(re.compile(stage.pattern), stage.says) for stage in table.stages]
        self._facts = {name: re.compile(pattern) for name, pattern in table.facts.items()}
        self._found: dict[str, str] = {}
        self.stage: str | None = None

    def look(self) -> None:
        """Read what is new."""
        for line in self._log.new_lines():
            for pattern, says in self._stages:
                if says != self.stage and pattern.search(line):
                    self.stage = says
                    self._say(f"{self._table.title}: {says}")
            for name, fact in self._facts.items():
                if seen := fact.search(line):
                    self._found[name] = seen.group(1)

    def log_tail(self, lines: int = 40) -> list[str]:
        """The last lines that it wrote."""
        return self._log.tail(lines)

    def facts(self) -> Mapping[str, float | str]:
        """What the engine has said of itself: numbers without their thousands' commas."""
        self.look()
        return {name: _number_or_text(text) for name, text in self._found.items()}


def _number_or_text(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since it booted; None: not known."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None
