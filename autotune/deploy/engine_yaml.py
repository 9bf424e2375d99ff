"""`engine.yaml`: a configuration of the bundled engine as a file, with the evidence in comments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.strict_yaml import read_yaml_mapping
from autotune.deploy.yaml_text import comment, setting
from autotune.errors import BadInput
from autotune.speculative_models import with_speculative_model
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError


def read_knobs(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The knobs that a YAML file sets, and only those; overrides take the place of the file's.

    A speculative method gets the model that is known for it, where none is named.

    What comes back is checked as a whole, so that an override may mend what the file alone would
    contradict.

    Raises:
        BadInput: the file cannot be read, or holds an unknown knob or a bad value.
        ConfigError: the overrides are what is wrong.
    """
    values = read_yaml_mapping(path)
    for name in values:
        if name not in KNOBS:
            # The file may be spelled as flags are: with dashes.
            near = difflib.get_close_matches(name.replace("-", "_"), KNOBS, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise BadInput(f"{path}: unknown knob {name!r}{hint}")
    merged = with_speculative_model({**values, **(overrides or {})})
    try:
        config = EngineConfig.from_mapping(merged)
    except ConfigError:
        try:
            EngineConfig.from_mapping(with_speculative_model(values))
        except ConfigError as error:
            raise BadInput(f"{path}: {error}") from error
        raise
    return {name: getattr(config, name) for name in merged}


def render_engine_yaml(config: EngineConfig, evidence: Evidence) -> str:
    """The file's text: every knob, so that a later release's defaults change nothing.

    Reading it back gives an equal configuration.
    """
    lines = comment("Configuration of autotune's bundled engine. Use: autotune serve FILE")
    for line in evidence.summary:
        lines += comment(line, indent="  ")
    values = config.to_dict()
    tuned = [name for name in values if name in evidence.changes]
    if tuned:
        lines += ["", *comment("Tuned:")]
    for name in tuned:
        lines += comment(evidence.of_knob(name) or "", indent="  ")
        lines.append(setting(name, values[name]))
    lines += ["", *comment("Left as the run was started with:" if tuned else "All knobs:")]
    lines += [setting(name, value) for name, value in values.items() if name not in tuned]
    return "\n".join(lines) + "\n"
