"""The requests of a sweep."""

from __future__ import annotations

from autotune.predict.calibration_load import (
    BATCH_SIZES,
    DECODE_STEPS,
    LONG,
    MIXED_PLACE,
    MIXED_REQUESTS,
    PROMPT_SHARES,
    SHORT,
    calibration_load,
)
from autotune.workload.materialise import LoadRequest

LENGTH = 1000


def prompts(part: list[LoadRequest]) -> int:
    return sum(len(request.token_ids) for request in part)


def test_every_size_decodes_at_several_moments_and_the_dearest_come_last() -> None:
    parts = calibration_load(4096, LENGTH, 64)
    names = [request.request_id for part in parts for request in part]
    assert len(names) == len(set(names))
    assert [len(part) for part in parts[: len(PROMPT_SHARES)]] == [1] * len(PROMPT_SHARES)
    assert len(parts[MIXED_PLACE]) == MIXED_REQUESTS
    decodes = [part for part in parts[MIXED_PLACE + 1 :] if part[0].output_tokens == DECODE_STEPS]
    assert len(decodes) == len(parts) - MIXED_PLACE - 1
    sizes = [size for size in BATCH_SIZES if size <= 64]
    for size in sizes:
        alike = [part for part in decodes if len(part) == size]
        tokens = [prompts(part) / size / LENGTH for part in alike]
        assert sum(share < 2 * SHORT for share in tokens) == 3
        assert sum(share > 0.8 * LONG for share in tokens) == 1
    assert prompts(decodes[-1]) == max(map(prompts, decodes))


def test_batches_that_the_cache_does_not_hold_are_left_out() -> None:
    parts = calibration_load(4096, LENGTH, 64, cache_tokens=8 * 500)
    decodes = parts[MIXED_PLACE + 1 :]
    assert max(prompts(part) + len(part) * DECODE_STEPS for part in decodes) <= 4000
    assert max(map(len, decodes)) == 64
