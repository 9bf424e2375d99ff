from __future__ import annotations

from pathlib import Path

import pytest

from autotune.records import RunFolder
from reports import render_report
from tests.reports.page import Page
from tests.reports.synthetic_run import write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with a proven winner; tests only read it."""
    folder = write_run(tmp_path_factory.mktemp("finished"), trials=14, rounds=3, requests=90)
    folder.deploy.mkdir()
    (folder.deploy / "engine.yaml").write_text("quantization: int8  # <chosen>\n")
    render_report(folder.path)
    return folder


@pytest.fixture(scope="session")
def page(finished: RunFolder) -> Page:
    """Its report."""
    return Page.read(finished.report_html)


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    return tmp_path / "run"
