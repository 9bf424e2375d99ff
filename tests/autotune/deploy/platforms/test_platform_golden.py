"""Platform files as a person gets them, compared whole.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/autotune/deploy/platforms`, then read the
difference. The engines' own files are compared beside the engines' exports.
"""

import os
from pathlib import Path

import pytest

from tests.autotune.deploy.platforms.exported_runs import exported

GOLDEN = Path(__file__).parent / "golden"
ENGINE_FILES = {"vllm.yaml", "sglang.yaml", "engine.yaml"}
APPROVED = [
    ("cpu", "compose", "vllm"),
    ("gpus", "compose", "sglang"),
    ("cpu", "compose", "engine"),
    ("cpu", "kubernetes", "vllm"),
    ("gpus", "kubernetes", "vllm"),
    ("gpus", "kserve", "vllm"),
    ("cpu", "kserve", "engine"),
    ("gpus", "helm", "vllm"),
    ("cpu", "helm", "vllm"),
    ("gpus", "ray-serve", "vllm"),
    ("cpu", "ray-serve", "vllm"),
    ("gpus", "dynamo", "vllm"),
    ("gpus", "nim", "vllm"),
    ("gpus", "skypilot", "vllm"),
    ("cpu", "systemd", "engine"),
]


@pytest.mark.parametrize(("run", "target", "engine"), APPROVED)
def test_files_are_as_they_were_read_and_approved(run: str, target: str, engine: str) -> None:
    folder = GOLDEN / f"{run}-{target}-{engine}"
    files = exported(run, target, engine).files
    own = {name: text for name, text in files.items() if name not in ENGINE_FILES}
    if os.environ.get("UPDATE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in own.items():
            (folder / name).write_text(text)
    assert sorted(own) == sorted(path.name for path in folder.iterdir())
    for name, text in own.items():
        assert text == (folder / name).read_text(), name
