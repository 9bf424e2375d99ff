"""What a user asks of a search over another engine's flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.errors import BadInput
from autotune.search.options import TuneOptions
from autotune.slo import QUALITY_METRICS

# An engine takes a minute or two to start, so that minutes would pay for nothing.
DEFAULT_BUDGET_S = 3600.0
DEFAULT_ROUNDS = 4
DEFAULT_FINALISTS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalOptions(TuneOptions):
    """Options of `tune_external`; times in seconds. Knobs carry the engine's names.

    `narrowing` and `space_file` of the base are of the engine's knobs; `config` and `advice`, which
    are the bundled engine's, have no effect.

    Args:
        engine: name of its table, as `vllm`.
        model: what it serves: a folder, a file or a name that it knows.
        tokenizer: folder of the model's config and tokenizer, where `model` is not one.
        engine_path: its program, or the Python that has it.
        device: where it runs; None has the engine tell.
        fixed: values of knobs for every trial, the defaults too.
        engine_arguments: given to it as they are.
        url: of a server that `restart_command` restarts with a trial's flags.
        restart_command: its words, {flags} among them.
        served_name: the model's name in requests.
        api_key_env: the environment variable with the server's API key.
        start_limit_s: how long a start may take; None takes the table's.
        lossy: whether knobs that may change what is generated are searched too.
        short_share: part of a window that is offered first, to spare hopeless trials the rest; 0
            offers every trial the whole.
    """

    engine: str
    model: str = ""
    tokenizer: str | None = None
    engine_path: str | None = None
    device: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    engine_arguments: tuple[str, ...] = ()
    url: str | None = None
    restart_command: tuple[str, ...] = ()
    served_name: str | None = None
    api_key_env: str | None = None
    start_limit_s: float | None = None
    lossy: bool = False
    short_share: float = 0.25

    def __post_init__(self) -> None:
        # Without arguments `super` does not work in a class that slots were added to.
        TuneOptions.__post_init__(self)
        if (self.url is None) != (not self.restart_command):
            raise BadInput(
                "--url and --restart-command belong together: a search has to restart the server "
                "with the flags of each trial (autotune bench --url measures a server as it is)"
            )
        given = {"--engine-path": self.engine_path, "--engine-args": self.engine_arguments}
        if self.url is not None and (idle := [flag for flag, value in given.items() if value]):
            raise BadInput(
                f"{' and '.join(idle)} has no effect with --url: write it into the restart command"
            )
        if not self.model and not self.tokenizer:
            raise BadInput(
                "the model is not known: give --model FOLDER, whose config and tokenizer tell the "
                "vocabulary and the longest context"
            )
        if not 0 <= self.short_share < 1:
            raise BadInput(f"the short load's share must be in 0..1, got {self.short_share:g}")
        quality = [x.text for x in self.parsed_slo.limits if x.metric in QUALITY_METRICS]
        if quality:
            raise BadInput(
                f"the quality of another engine's answers is not measured: leave {quality[0]!r} out"
            )

    @property
    def shape_folder(self) -> str:
        """The folder whose config tells the model's vocabulary and longest context."""
        return self.tokenizer or self.model
