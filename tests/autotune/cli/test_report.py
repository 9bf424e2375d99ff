"""`autotune report` knows the folder of a plan."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from autotune.cli.main import app
from tests.reports.synthetic_plan import plan_json, write_plan


def test_a_plans_report_is_made_again(tmp_path: Path) -> None:
    write_plan(tmp_path, plan_json())
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    written = Path(json.loads(result.stdout)["report"])
    assert written == tmp_path / "report.html"
    assert "Get 9 × NVIDIA L40S 48 GB" in written.read_text(encoding="utf-8")
