import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from autotune.cli.main import app
from autotune.deploy.engine_yaml import read_knobs
from autotune.deploy.targets import all_targets
from engine.config import EngineConfig

WINNER: dict[str, Any] = {"model": "m", "max_num_seqs": 32, "quantization": "int8"}


def finished(folder: Path, **changes: Any) -> Path:
    run: dict[str, Any] = {
        "schema_version": 1,
        "status": "done",
        "hardware": {"device": "cpu"},
        "result": {"winner_config": WINNER, "changes": {"max_num_seqs": [256, 32]}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run | changes))
    return folder


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_engines_file_reads_back_as_the_winner(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    result = export(run, "--to", "engine")
    assert result.exit_code == 0
    path = run / "deploy" / "engine" / "engine.yaml"
    assert result.stdout.splitlines()[0] == str(path)
    assert EngineConfig.from_mapping(read_knobs(path)) == EngineConfig(**WINNER)
    assert export(run, "--to", "engine").exit_code == 0  # its own folder may be refreshed


def test_vllms_file_goes_where_it_is_asked(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    target = tmp_path / "a" / "b"
    result = export(run, "--to", "vllm", "-o", target, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["file"] == answer["files"][0] == str(target / "vllm.yaml")
    assert (answer["schema_version"], answer["to"]) == (1, "vllm")
    assert "quantization" in [left["knob"] for left in answer["lost"]]
    assert sorted(answer["files"]) == sorted(map(str, target.iterdir()))
    assert yaml.safe_load((target / "vllm.yaml").read_text())["max-num-seqs"] == 32
    assert not (run / "deploy").exists()


def test_a_file_of_somebody_else_is_kept(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    mine = tmp_path / "vllm.yaml"
    mine.write_text("mine\n")
    result = export(run, "--to", "vllm", "-o", tmp_path)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert mine.read_text() == "mine\n"
    assert export(run, "--to", "vllm", "-o", tmp_path, "--force").exit_code == 0
    assert mine.read_text() != "mine\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"result": None, "status": "interrupted"}, "no result yet (status interrupted)"),
        ({"result": None}, "finish it with autotune run --resume /"),
        ({"result": {}}, "no result yet"),
        ({"kind": "profile"}, "is of autotune profile, which chooses no winner"),
        ({"result": {"winner_config": {"max_num_seqs": 0}}}, "winner's config is unreadable"),
        ({"result": {"winner_config": {"no_knob": 0}}}, "unknown knob 'no_knob'"),
        ({"result": {"gain": {}}}, "winner's config is unreadable"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_runs_without_a_usable_result_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    result = export(finished(tmp_path / "run", **changes), "--to", "engine")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_help_names_every_target() -> None:
    # Lines of the help may break within a name, at its dash.
    text = "".join(CliRunner().invoke(app, ["export", "--help"]).stdout.split())
    assert [name for name in all_targets() if name not in text] == []


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    result = export(tmp_path, "--to", "engine")
    assert result.exit_code == 2
    assert "holds no run" in result.stderr
    result = export(finished(tmp_path / "run"), "--to", "sglong")
    assert result.exit_code == 2
    assert "known are engine, " in result.stderr
    assert export(finished(tmp_path / "run")).exit_code == 2
    file = tmp_path / "file"
    file.write_text("")
    assert export(file, "--to", "engine").exit_code == 2
