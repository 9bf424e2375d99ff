"""A launch finds what was measured, or its default; what may no longer be chosen is not."""

import pytest

from kernels.triton import tuning
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem, TuningTable

FACTS = DeviceFacts("Some GPU", (9, 0), 132, 232_448)
PROBLEM = Problem("sample", (16, 64), ("bf16",))
FIRST, SECOND = Choice("triton", {"block_m": 16}), Choice("triton", {"block_m": 32})


@pytest.fixture(autouse=True)
def _own_state(monkeypatch):
    monkeypatch.setattr(tuning, "_state", tuning._State())
    tuning.use(TuningTable(), FACTS)
    tuning.announce("sample", lambda problem, facts: [FIRST, SECOND])


def test_rows_are_rounded_up_to_powers_of_two():
    found = [tuning.round_rows(m) for m in (0, 1, 2, 3, 4, 5, 64, 65, 8192)]
    assert found == [1, 1, 2, 4, 4, 8, 64, 128, 8192]


def test_the_default_is_made_once_and_a_measured_choice_takes_its_place():
    made = []

    def default(problem, facts):
        made.append((problem, facts))
        return FIRST

    assert [tuning.choice_for(PROBLEM, default, FACTS) for _ in range(3)] == [FIRST] * 3
    assert made == [(PROBLEM, FACTS)]
    assert tuning.untuned() == [PROBLEM]
    tuning.put(PROBLEM, SECOND, FACTS)
    assert tuning.choice_for(PROBLEM, default, FACTS) == SECOND
    assert tuning.untuned() == []
    other = FACTS._replace(shared_memory=101_376)
    tuning.use(TuningTable(), other)
    assert tuning.choice_for(PROBLEM, FIRST, other) == FIRST


def test_what_the_kernel_does_not_list_is_not_used():
    gone = Choice("triton", {"block_m": 4096})
    tuning.put(PROBLEM, gone, FACTS)
    assert tuning.choice_for(PROBLEM, FIRST, FACTS) == FIRST
    unknown = Problem("nobody", (1,))
    tuning.put(unknown, gone, FACTS)
    assert tuning.choice_for(unknown, FIRST, FACTS) == FIRST
    assert tuning.candidates(unknown, FACTS) == []
    assert unknown not in tuning.untuned()  # there is nothing to choose from


def test_a_forced_choice_lasts_as_long_as_its_block():
    with tuning.forced({PROBLEM: SECOND}):
        assert tuning.choice_for(PROBLEM, FIRST, FACTS) == SECOND
        with tuning.forced({PROBLEM: FIRST}):
            assert tuning.choice_for(PROBLEM, SECOND, FACTS) == FIRST
        assert tuning.choice_for(PROBLEM, FIRST, FACTS) == SECOND
    assert tuning.choice_for(PROBLEM, FIRST, FACTS) == FIRST


def test_recording_tells_what_was_asked_for():
    tuning.choice_for(PROBLEM, FIRST, FACTS)
    with tuning.recording() as asked:
        tuning.choice_for(PROBLEM, FIRST, FACTS)
        assert asked == {PROBLEM: FIRST}
    tuning.choice_for(PROBLEM._replace(sizes=(1,)), FIRST, FACTS)
    assert list(asked) == [PROBLEM]
