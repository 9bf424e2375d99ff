from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.formatting import (
    MISSING,
    duration,
    knob_value,
    milliseconds,
    number,
    percent,
    quantity,
    significant,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.5, "0.5"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (999.96, "1,000"),
        (-2.5, "−2.5"),
        (0.000012, "1.20×10⁻⁵"),
        (3.2e12, "3.20×10¹²"),
        (None, MISSING),
    ],
)
def test_significant(value: float | None, text: str) -> None:
    assert significant(value) == text


@given(st.floats(1e-4, 9e8))
def test_a_written_number_is_within_half_a_percent(value: float) -> None:
    assert float(significant(value).replace(",", "")) == pytest.approx(value, rel=5.01e-3)


@given(st.one_of(st.none(), st.floats(), st.integers(), st.text(), st.booleans()))
def test_anything_can_be_formatted(value: object) -> None:
    kept = number(value)
    for write in (significant, milliseconds, percent, duration, size):
        text = write(kept)
        assert len(text) < 40
        assert "nan" not in text
        assert "inf" not in text
    assert knob_value("max_num_seqs", value) is not None


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "1", True, None, [1]])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None


def test_units() -> None:
    assert milliseconds(0.1834) == "183 ms"
    assert quantity(0.1834, "s") == "183 ms"
    assert quantity(4.2, "requests/s") == "4.2 requests/s"
    assert percent(0.0512) == "5.12%"
    assert size(3 * 2**30) == "3 GiB"
    assert duration(7.5) == "7.5 s"
    assert duration(241.0) == "4 min 1 s"
    assert duration(239.7) == "4 min 0 s"
    assert duration(3600 * 5 + 120) == "5 h 2 min"


def test_knob_values_are_written_as_a_person_would() -> None:
    assert knob_value("enable_prefix_caching", True) == "on"
    assert knob_value("kv_cache_memory_bytes", 4 * 2**30) == "4 GiB"
    assert knob_value("kv_cache_memory_bytes", None) == "automatic"
    assert knob_value("max_num_batched_tokens", 2048) == "2048"
    assert knob_value("long_prefill_token_threshold", 0) == "0"
    assert knob_value("quantization", "int8") == "int8"
