"""The package's name is shared with one that transformers probes for: it must stay harmless."""

import ast
import importlib.util
import sys
from pathlib import Path

import kernels

ROOT = Path(kernels.__file__).parents[1]


def test_the_package_imports_nothing():
    tree = ast.parse(Path(kernels.__file__).read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_its_version_is_not_one_that_transformers_takes_for_its_own():
    major, minor, _ = kernels.__version__.split(".")
    assert (int(major), int(minor)) < (0, 9)


def test_transformers_imports_with_the_package_on_the_path():
    assert importlib.util.find_spec("kernels").origin == kernels.__file__
    import transformers.models.llama.modeling_llama as module
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
    assert module.LlamaForCausalLM.__name__ == "LlamaForCausalLM"
    assert sys.modules["kernels"] is kernels


def test_the_room_imports_no_room_above_it():
    for source in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in {"engine", "autotune", "reports"}, source
