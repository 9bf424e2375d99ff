"""YAML of plain values, read by libyaml: a table of techniques takes a second without it.

What persons write is read by `autotune.deploy.strict_yaml`, which tells better where it is wrong.
"""

from __future__ import annotations

from typing import Any

import yaml

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML was built without it
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


def safe_load(text: str) -> Any:
    """What a YAML text holds; no objects are made of it.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)
