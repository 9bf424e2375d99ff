"""Where a command puts its result if nobody says."""

from __future__ import annotations

import datetime
import re
from pathlib import Path


def default_folder(model: str) -> Path:
    """`runs/<time>-<model>`; without a model the embedded one."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name) or "embedded"
    return Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
