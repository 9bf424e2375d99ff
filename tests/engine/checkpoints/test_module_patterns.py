"""Patterns of a checkpoint's config: what is taken, and what could take for ever."""

from __future__ import annotations

import pytest

from engine.checkpoints.module_patterns import compile_pattern
from engine.errors import ModelError


def test_what_configs_say_is_taken() -> None:
    pattern = compile_pattern(r".*layers\.(0|1)\.mlp\.(gate|up)_proj$", "config.json")
    assert pattern.match("model.layers.1.mlp.up_proj")
    assert not pattern.match("model.layers.2.mlp.up_proj")


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(?:a|a)*$",
        "(?x)(a|a) *$",
        "(?x)(a|a)#\n*$",
        "(?x)(a|a) # b\n # c\n {2,}$",
    ],
)
def test_a_repeated_group_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="could take too long"):
        compile_pattern(text, "config.json")
