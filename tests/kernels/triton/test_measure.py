"""The fastest choice wins, but never one that is wrong, fails or is faster only by noise."""

import pytest
import torch

from kernels.triton import measure, tuning
from kernels.triton.measure import DeviceBroken, Operation, Timing, best_choice
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem, TuningTable

FACTS = DeviceFacts("Some GPU", (9, 0), 132, 232_448)
PROBLEM = Problem("sample", (32, 48))
DEFAULT = Choice("default")


class Sample:
    """An operation whose choices behave as their names say, and a timer that reads a table."""

    def __init__(self, seconds, behaviour=None):
        self.seconds = {"default": 1.0, **seconds}
        self.behaviour = behaviour or {}
        self.right = torch.randn(32, 48)
        self.operation = Operation("sample", [self.run], 1)
        self.timed = []
        self.runs = 0

    def chosen(self):
        return tuning.choice_for(PROBLEM, DEFAULT, FACTS).path

    def run(self):
        self.runs += 1
        change = self.behaviour.get(self.chosen(), torch.clone)
        return change(self.right)

    def timer(self, operation):
        operation.runs[0]()
        path = self.chosen()

        def again():
            assert self.chosen() == path
            self.timed.append(path)
            seconds = self.seconds[path]
            return Timing.of([seconds() if callable(seconds) else seconds])

        return again

    def best(self):
        choices = [DEFAULT, *(Choice(path) for path in self.seconds if path != "default")]
        return best_choice(PROBLEM, DEFAULT, choices, self.operation, self.timer)


@pytest.fixture(autouse=True)
def _own_state(monkeypatch):
    monkeypatch.setattr(tuning, "_state", tuning._State())
    tuning.use(TuningTable(), FACTS)


def test_the_fastest_wins_and_the_fastest_few_are_measured_in_turns():
    sample = Sample({"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.8})
    outcome = sample.best()
    assert outcome.measured == measure.Measured(Choice("b"), 0.5, 1.0)
    assert sample.timed[5:] == ["default", "b", "c", "d"] * (measure.ROUNDS - 1)
    assert [choice.path for choice, _ in outcome.times] == ["default", "a", "b", "c", "d"]


def test_noise_does_not_win():
    assert Sample({"a": 0.99}).best().measured.choice == DEFAULT
    lucky_once = iter([0.2, 1.0, 1.0])
    outcome = Sample({"a": lambda: next(lucky_once)}).best()
    assert outcome.measured.choice == DEFAULT
    assert Sample({}).best().measured == measure.Measured(DEFAULT, 1.0, 1.0)


def one_element(x):
    x = x.clone()
    x[3, 7] += 1.0
    return x


def one_row(x):
    x = x.clone()
    x[5] *= 1.05
    return x


def not_a_number(x):
    x = x.clone()
    x[0, 0] = float("nan")
    return x


def raises(error):
    def change(_x):
        raise error

    return change


@pytest.mark.parametrize(
    "wrong",
    [
        one_element,
        one_row,
        not_a_number,
        torch.zeros_like,
        lambda x: x.to(torch.bfloat16),
        lambda x: x[:, :-1].clone(),
        raises(RuntimeError("out of resources")),
        raises(ValueError("cannot be compiled")),
        raises(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_what_is_wrong_or_fails_is_refused_however_fast(wrong):
    outcome = Sample({"fast": 0.01, "fair": 0.9}, {"fast": wrong}).best()
    assert outcome.measured.choice == Choice("fair")
    ((choice, reason),) = outcome.refused
    assert choice == Choice("fast")
    assert reason


def test_a_result_that_is_right_only_sometimes_is_refused():
    results = iter([torch.clone, one_element])
    outcome = Sample({"racy": 0.01}, {"racy": lambda x: next(results)(x)}).best()
    assert [choice.path for choice, _ in outcome.refused] == ["racy"]


def test_memory_that_a_choice_does_not_write_holds_no_right_result(monkeypatch):
    steps = []
    monkeypatch.setattr(measure, "_poison", lambda like: steps.append(like.shape))
    Sample({"a": 0.5}, {"a": lambda x: (steps.append("run"), x.clone())[1]}).best()
    assert steps[:4] == [(32, 48), "run", (32, 48), "run"]


def test_rounding_and_another_order_of_sums_are_no_difference():
    a, b = torch.randn(33, 512), torch.randn(512, 40)
    exact = (a.double() @ b.double()).float()
    rounded = exact.to(torch.bfloat16)
    parts = (a[:, :200] @ b[:200] + a[:, 200:] @ b[200:]).to(torch.bfloat16)
    assert measure.difference(parts, rounded) is None
    assert measure.difference(rounded.clone(), rounded) is None
    infinite = exact.clone()
    infinite[2, 2] = float("inf")
    assert measure.difference(infinite.clone(), infinite) is None
    assert measure.difference(exact, infinite) is not None
    assert measure.difference(torch.zeros(3, 0), torch.zeros(3, 0)) is None
    padded = torch.cat([exact, torch.zeros(2, 40)])
    assert measure.difference(padded.clone(), padded) is None
    dirty = padded.clone()
    dirty[-1] = 1.0
    assert measure.difference(dirty, padded) is not None


def test_a_default_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="no such kernel"):
        Sample({"a": 0.5}, {"default": raises(RuntimeError("no such kernel"))}).best()


def test_a_broken_device_ends_the_measurement_and_leaves_the_default(monkeypatch):
    def broken(_device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nlong tail")

    sample = Sample({"a": 0.5}, {"a": raises(RuntimeError("illegal memory access"))})
    monkeypatch.setattr(measure, "_synchronize", broken)
    with pytest.raises(DeviceBroken, match=r"sample .* with a .*illegal memory access") as caught:
        sample.best()
    assert caught.value.default == measure.Measured(DEFAULT, 1.0, 1.0)


def test_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)
