from __future__ import annotations

from autotune.conditional_knobs import GOVERNED, idle_because
from engine.config import KNOBS, EngineConfig


def test_rules_are_about_knobs_and_values_that_there_are() -> None:
    for name, governed in GOVERNED.items():
        assert name in KNOBS
        assert set(governed.among) < set(KNOBS[governed.by].choices or ())
        # What governs is itself governed by nothing: one look tells whether a knob is idle.
        assert governed.by not in GOVERNED


def test_every_knob_of_speculation_but_the_method_is_idle_without_one() -> None:
    names = [n for n in KNOBS if "speculative" in n or n.startswith("prompt_lookup")]
    assert {n for n in names if idle_because(n, EngineConfig().to_dict())} == {
        n for n in names if n != "speculative_method"
    }


def test_a_method_heeds_its_own_knobs() -> None:
    def heeded(method: str) -> set[str]:
        return {n for n in GOVERNED if idle_because(n, {"speculative_method": method}) is None}

    lengths = {"num_speculative_tokens", "speculative_adaptive"}
    lookup = {"prompt_lookup_min", "prompt_lookup_max", "prompt_lookup_window"}
    assert heeded("ngram") == heeded("suffix") == lengths | lookup
    assert heeded("draft_model") == heeded("medusa") == lengths | {"speculative_model"}
    assert idle_because("max_num_seqs", {}) is None
    assert idle_because("prompt_lookup_max", {}) == "has no effect while speculative_method is none"
