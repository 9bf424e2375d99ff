from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write_file(content: str | bytes) -> Path:
        path = tmp_path / "workload"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
