"""An engine that is not ours: its program, its version, and what every trial keeps."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autotune.errors import BadInput, EnvironmentMissing
from autotune.external.failures import last_error
from autotune.external.flags import problems_of
from autotune.external.table import Device, EngineTable, Value, load_table
from autotune.hardware.gpu import read_gpus
from autotune.load.received import for_people

# Asking a Python engine for its version imports all of it.
_ASK_LIMIT_S = 180.0
_MOST_PRINTED = 4 << 20


@dataclass(frozen=True, slots=True)
class ExternalEngine:
    """What is the same for every trial.

    `program` begins the command line. `fixed` are values of knobs that the user has given: a trial
    adds its own to them, and the defaults that are compared with have them too. `extra_arguments`
    go to the engine as they are. `api_key` is what it wants of those who ask it; never shown.

    `missing` are knobs that this release has no flag for, which are not in its table; None: it was
    not asked, or does not list its flags.

    With `restart_command` the server runs where that command starts it and answers at `url`.
    """

    table: EngineTable
    program: tuple[str, ...]
    version: str | None
    device: Device
    model: str
    served_name: str
    fixed: Mapping[str, Value] = field(default_factory=dict)
    extra_arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    start_limit_s: float = 600.0
    url: str | None = None
    restart_command: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None

    @property
    def version_checked(self) -> bool:
        """Whether the table's flags were checked with this release."""
        return self.version is not None and self.version in self.table.version.checked

    def version_note(self) -> str | None:
        """A sentence for a release that the table was not checked with; None where it was."""
        if self.version_checked:
            return None
        checked = ", ".join(self.table.version.checked)
        title = self.table.title
        which = f"{title} {self.version} is none of" if self.version else f"{title} may be none of"
        note = f"{which} the releases that its flags were checked with ({checked})"
        if self.missing:
            return f"{note}; it lacks those of {', '.join(self.missing)}, which are left alone"
        if self.restart_command:
            return f"{note}, as it is not asked for its version"
        if self.missing is None:
            return f"{note}, and it does not list its own: it may refuse or misread them"
        return f"{note}; it has all of them, and they may mean something else"


def find_engine(
    name: str,
    model: str,
    *,
    program: str | None = None,
    device: Device | None = None,
    served_name: str | None = None,
    fixed: Mapping[str, Value] | None = None,
    extra_arguments: Sequence[str] = (),
    start_limit_s: float | None = None,
    api_key: str | None = None,
) -> ExternalEngine:
    """Find an engine on this machine and ask it for its version.

    Arguments:
        name: of the table, as `vllm`.
        model: what it shall serve: a folder, a file or a name that it knows.
        program: its command or the Python that has it; without one, as the table names it.
        device: where it runs; without one, as its build tells, or a GPU where there is one.
        served_name: the model's name in requests; without one, the last part of `model`.
        fixed: values of knobs for every trial, the defaults too.
        extra_arguments: given to it as they are.
        start_limit_s: seconds until it must be healthy; without one, the table's.
        api_key: what it wants of those who ask it.

    Raises:
        BadInput: no such engine, or the fixed values or arguments are refused.
        EnvironmentMissing: the program is not there or does not run.
    """
    table = load_table(name)
    found = _program(table, program)
    printed = _ask(table, found)
    version = _version(table, printed)
    if device is None:
        device = _device(table, printed)
    _refuse_flags_of_trials(table, extra_arguments, device)
    engine = ExternalEngine(
        table=table,
        program=found,
        version=version,
        device=device,
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        served_name=served_name or Path(model).name,
        fixed=dict(fixed or {}),
        extra_arguments=tuple(extra_arguments),
        start_limit_s=start_limit_s or table.start_limit_s,
        api_key=api_key,
    )
    if not engine.version_checked:
        engine = without_missing_flags(engine)
    if problems := problems_of(engine.table, engine.fixed, device):
        raise BadInput(f"the values given for {table.title} are refused: {'; '.join(problems)}")
    return engine


def running_engine(
    name: str,
    url: str,
    restart_command: Sequence[str],
    *,
    model: str = "",
    device: Device = "cuda",
    served_name: str = "",
    fixed: Mapping[str, Value] | None = None,
    start_limit_s: float | None = None,
    api_key: str | None = None,
) -> ExternalEngine:
    """An engine that a command of the user's restarts, here or on another machine.

    Arguments:
        name: of the table, which tells the flags' names.
        url: of the server, as http://host:port.
        restart_command: words of the command; {flags} in them is where the flags go.
        model: what it serves, for the records; the server is not told.
        device: where it runs.
        served_name: the model's name in requests; without one, the first that the server lists.
        fixed: values of knobs for every trial.
        start_limit_s: seconds until it must be healthy; without one, the table's.
        api_key: what it wants of those who ask it.

    Raises:
        BadInput: no such engine, no place for the flags, or the fixed values are refused.
    """
    table = load_table(name)
    if not any("{flags}" in word for word in restart_command):
        raise BadInput(
            "the restart command has no {flags}: write where the flags of a trial go, as in "
            f"'docker run --rm image {table.program} … {{flags}}'"
        )
    if problems := problems_of(table, dict(fixed or {}), device):
        raise BadInput(f"the values given for {table.title} are refused: {'; '.join(problems)}")
    return ExternalEngine(
        table=table,
        program=(),
        version=None,
        device=device,
        model=model,
        served_name=served_name,
        fixed=dict(fixed or {}),
        start_limit_s=start_limit_s or table.start_limit_s,
        url=url.rstrip("/"),
        restart_command=tuple(restart_command),
        api_key=api_key,
    )


def without_missing_flags(engine: ExternalEngine) -> ExternalEngine:
    """The engine, its table without the knobs whose flags its own help does not list.

    `find_engine` does so for releases that the table was not checked with.
    """
    if engine.restart_command or not engine.table.version.help:
        return engine
    _, told = _run((*engine.program, *engine.table.version.help))
    listed = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", told))
    if len(listed) < len(engine.table.knobs) // 2:
        # No list of its flags: nothing can be told from it.
        return engine
    missing = {
        name
        for name, knob in engine.table.knobs.items()
        for flag in (knob.flag, knob.negated_flag)
        if flag is not None and flag not in listed
    }
    # What means something only beside a knob that is gone goes with it.
    missing |= {
        name
        for name, knob in engine.table.knobs.items()
        if knob.only_with is not None and knob.only_with.knob in missing
    }
    kept = {name: knob for name, knob in engine.table.knobs.items() if name not in missing}
    rules = tuple(rule for rule in engine.table.rules if not missing & set(rule.knobs))
    table = engine.table.model_copy(update={"knobs": kept, "rules": rules})
    names = tuple(name for name in engine.table.knobs if name in missing)
    return replace(engine, table=table, missing=(*(engine.missing or ()), *names))


def _refuse_flags_of_trials(table: EngineTable, words: Sequence[str], device: Device) -> None:
    """Refuse arguments that would be given twice: the later ones would hold, for every trial.

    Raises:
        BadInput: there are some.
    """
    own = table.start(device).arguments
    knob_of: dict[str, str] = {}
    for name, knob in table.knobs.items():
        for flag in (knob.flag, knob.negated_flag):
            if flag is not None:
                knob_of.setdefault(flag, name)
    for word in words:
        # Python's engines take underscores for dashes.
        flag = word.partition("=")[0].replace("_", "-")
        if flag in knob_of:
            raise BadInput(
                f"--engine-args: {flag} would hold for every trial, whatever value it is to have: "
                f"fix it with --search {knob_of[flag]}=VALUE"
            )
        if flag.startswith("-") and flag in own:
            raise BadInput(f"--engine-args: {flag} is given at every start already: leave it out")


def _program(table: EngineTable, given: str | None) -> tuple[str, ...]:
    wanted = given or table.program
    path = shutil.which(wanted)
    if path is None:
        hint = "give its path with --engine-path" if given is None else "check the path"
        raise EnvironmentMissing(f"{table.title}'s program {wanted!r} was not found: {hint}")
    # Not resolved: the python of a virtual environment is a link, and is itself by its place.
    path = os.path.abspath(path)  # noqa: PTH100
    if re.fullmatch(r"python[\d.]*", Path(path).name) and table.module is not None:
        # -P: the folder that we are called in must not stand before the engine's own packages.
        return (path, "-P", "-m", table.module, *table.module_arguments)
    return (path, *table.program_arguments)


def _ask(table: EngineTable, program: tuple[str, ...]) -> str:
    """What tells its version.

    Raises:
        EnvironmentMissing: it cannot tell, as an engine that is not installed or is broken.
    """
    arguments = table.version.arguments
    if "-m" in program and table.version.distribution is not None:
        name = table.version.distribution
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        arguments = ("-P", "-c", code)
    status, printed = _run((program[0], *arguments))
    if status != 0:
        said = last_error(printed.splitlines()) or f"it ended with the exit status {status}"
        raise EnvironmentMissing(
            f"{program[0]} does not tell the version of {table.title}: {for_people(said)}"
        )
    return printed


@functools.cache
def _run(command: tuple[str, ...]) -> tuple[int, str]:
    """The exit status of a command, and the beginning of what it prints on either stream.

    Raises:
        EnvironmentMissing: it cannot be run, or hangs.
    """
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentMissing(f"{command[0]} cannot be run: {error.strerror}") from None
        try:
            status = process.wait(_ASK_LIMIT_S)
        except BaseException as error:
            # It may be a script, whose engine would go on alone.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                told = " ".join(command)
                raise EnvironmentMissing(f"{told!r} did not end in {_ASK_LIMIT_S:g} s") from None
            raise
        printed.seek(0)
        return status, printed.read(_MOST_PRINTED).decode(errors="replace")


def _version(table: EngineTable, printed: str) -> str | None:
    found = re.findall(table.version.pattern, printed)
    return str(found[-1]) if found else None


def _device(table: EngineTable, printed: str) -> Device:
    pattern = table.version.cpu_pattern
    if pattern is not None and re.search(pattern, printed):
        return "cpu"
    return "cuda" if read_gpus().gpus else "cpu"
