"""Choices survive on disk; what is not ours there is told of once and does no harm."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels.triton import tuning_cache
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem
from kernels.triton.tuning_cache import Measured, TuningCacheWarning

FACTS = DeviceFacts("NVIDIA H200 / 141 GB", (9, 0), 132, 232_448)
ENTRY = Measured(Choice("triton", {"block_m": 16, "num_warps": 4}), 1.5e-5, 2e-5)


def problem(number, kernel="int4_linear"):
    return Problem(kernel, (16, 4096, number), ("bf16", "int8"))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_was_stored_is_loaded():
    vendor = Measured(Choice("scaled_mm"), 1e-5, 1e-5)
    tuning_cache.store(problem(1), ENTRY, FACTS)
    tuning_cache.store(problem(2), vendor, FACTS)
    table = tuning_cache.load(FACTS)
    assert dict(table.items()) == {problem(1): ENTRY.choice, problem(2): vendor.choice}
    assert tuning_cache.entries(FACTS) == {problem(1): ENTRY, problem(2): vendor}
    path = tuning_cache.path_of(FACTS)
    assert path.name.startswith("NVIDIA_H200_141_GB-9.0-triton3.")
    assert path.parent.parts[-2:] == ("autotune", "kernels")
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".lock"}  # no scratch is left


def test_no_file_is_no_cause_for_a_word():
    assert tuning_cache.load(FACTS).items() == []


def edited(**changes):
    def edit(text):
        return json.dumps({**json.loads(text), **changes})

    return edit


def with_row(**changes):
    def edit(text):
        document = json.loads(text)
        document["choices"][0].update(changes)
        return json.dumps(document)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[" * 100_000, "not JSON"),
        (lambda text: "[1]", "not an object"),
        (edited(schema_version=99), "schema_version is 99"),
        (edited(device="NVIDIA A100"), "device is 'NVIDIA A100'"),
        (edited(multiprocessors=16), "multiprocessors is 16"),
        (edited(triton="1.0"), "triton is '1.0'"),
        (edited(choices={}), "choices are not a list"),
        (edited(choices=[None]), "choice 0 is malformed"),
        (with_row(sizes=[1, True]), "choice 0 is malformed"),
        (with_row(tiles={"block_m": "16"}), "choice 0 is malformed"),
        (with_row(seconds=-1.0), "choice 0 is malformed"),
        (lambda text: text.replace("1.5e-05", "NaN"), "choice 0 is malformed"),
    ],
)
def test_a_file_that_is_not_ours_is_told_of_and_replaced(edit, reason):
    tuning_cache.store(problem(1), ENTRY, FACTS)
    path = tuning_cache.path_of(FACTS)
    path.write_text(edit(path.read_text()))
    with pytest.warns(TuningCacheWarning, match="kernels run with their defaults") as told:
        assert tuning_cache.load(FACTS).items() == []
    assert [reason in str(one.message) for one in told] == [True]
    tuning_cache.store(problem(2), ENTRY, FACTS)
    assert tuning_cache.entries(FACTS) == {problem(2): ENTRY}


def test_a_file_that_cannot_be_read_is_told_of():
    path = tuning_cache.path_of(FACTS)
    path.mkdir(parents=True)
    with pytest.warns(TuningCacheWarning):
        assert tuning_cache.load(FACTS).items() == []


def test_a_folder_that_cannot_be_written_is_an_error_for_who_tunes(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError):
        tuning_cache.store(problem(1), ENTRY, FACTS)


def test_two_writers_at_once_lose_nothing_of_each_other():
    def store_some(numbers):
        for number in numbers:
            tuning_cache.store(problem(number), ENTRY, FACTS)

    # Each opens the lock's file for itself, as two processes do.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(store_some, [range(0, 40, 2), range(1, 40, 2)]))
    assert set(tuning_cache.entries(FACTS)) == {problem(number) for number in range(40)}
