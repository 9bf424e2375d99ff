"""`engine.yaml`: a configuration of the bundled engine as a file, with the evidence in comments."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from autotune.deploy.strict_yaml import read_yaml_mapping
from autotune.errors import BadInput
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError


def read_knobs(path: Path) -> dict[str, Any]:
    """The knobs that a YAML file sets, and only those, each checked.

    Raises:
        BadInput: the file cannot be read, or holds an unknown knob, a bad value or a contradiction.
    """
    values = read_yaml_mapping(path)
    for name in values:
        if name not in KNOBS:
            # The file may be spelled as flags are: with dashes.
            near = difflib.get_close_matches(name.replace("-", "_"), KNOBS, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise BadInput(f"{path}: unknown knob {name!r}{hint}")
    try:
        config = EngineConfig.from_mapping(values)
    except ConfigError as error:
        raise BadInput(f"{path}: {error}") from error
    return {name: getattr(config, name) for name in values}
