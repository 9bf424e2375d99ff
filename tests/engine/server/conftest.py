from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.server.tiny_served import Served, make_folder, served_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, with tokenizer and chat template."""
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Served]:
    """The tiny model, served; after each test it must be idle again, which tests ask it."""
    with served_tiny(tiny_folder) as served:
        yield served
