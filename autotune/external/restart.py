"""A server that a command of the user's restarts: on this machine, in a container, or elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from autotune.external.flags import Flags
from autotune.external.kept_process import KeptProcess
from autotune.external.probes import status_of


def restart_words(template: Sequence[str], flags: Flags) -> list[str]:
    """The command's words with the flags put in.

    A word that is {flags} becomes one word a flag; within a longer word, as for `sh -c`, they are
    quoted for a shell. {environment} is likewise where variables go, as NAME=value.
    """
    variables = [f"{name}={value}" for name, value in flags.environment.items()]
    parts = {"{flags}": list(flags.arguments), "{environment}": variables}
    words: list[str] = []
    for word in template:
        if word in parts:
            words += parts[word]
            continue
        for mark, content in parts.items():
            word = word.replace(mark, shlex.join(content))
        words.append(word)
    return words


class RestartCommand:
    """Runs the restart command; it may return once it has restarted, or stay as the server.

    Args:
        words: of the command, flags put in.
        environment: all of its variables.
        health_url: asked beforehand, so that an answer of the old server is not taken for the
            new one's.
        api_key: sent with that question.
        log_file: what the command writes is added there.
        pid_file: holds the process ids while it runs.
        grace_s: seconds between asking it to end and killing it.

    Raises:
        EnvironmentMissing: the command cannot be run.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str],
        *,
        health_url: str,
        api_key: str | None,
        log_file: Path,
        pid_file: Path,
        grace_s: float,
    ) -> None:
        self._health_url, self._api_key = health_url, api_key
        self._was_up = self._is_up()
        self._process = KeptProcess(
            words,
            environment,
            log_file=log_file,
            pid_file=pid_file,
            grace_s=grace_s,
            returns=True,
        )

    @property
    def pid(self) -> int | None:
        """The command's process while it stays; what it started elsewhere has none here."""
        return None if self._process.ended() else self._process.pid

    @property
    def status(self) -> int | None:
        """The command's exit status."""
        return self._process.status

    def ended(self) -> bool:
        """Whether the command failed; one that returns without fault has restarted the server."""
        return self._process.ended() and self._process.status != 0

    def answers_count(self) -> bool:
        """Whether the old server is gone: the command returned, or nobody answered meanwhile."""
        if self._was_up and not self._process.ended():
            self._was_up = self._is_up()
            return False
        return True

    def _is_up(self) -> bool:
        return status_of(self._health_url, api_key=self._api_key) == 200

    def stop(self) -> None:
        """End the command where it stayed; a server that runs elsewhere is not ours to end."""
        self._process.stop()
