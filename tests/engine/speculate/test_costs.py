"""Costs of steps and drafts: measured, interpolated, corrected."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from engine.batch import Batch, BatchResult
from engine.block_groups import ONE_GROUP, BlockGroup
from engine.config import EngineConfig
from engine.request import Request, RequestState
from engine.speculate.control_steps import ControlSteps
from engine.speculate.cost_curves import CostCurves, ladder
from engine.speculate.cost_grid import CostGrid, DraftCorrections, VerifyCorrections
from engine.speculate.draft import Draft
from engine.speculate.draft_lengths import LearningCosts, UncertainCosts
from engine.speculate.measured_costs import MeasuredCosts, measure_costs
from tests.engine.speculate.oracle_world import Roofline


class Machine:
    """Runs steps and drafts in virtual time by known costs, and checks what it is asked to run."""

    costs_device = True

    def __init__(
        self, config: EngineConfig, max_model_len: int, noise: float = 0.0, scale: float = 1.0
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.costs = Roofline(fixed=0.005, token=0.0002, slack=0.0, draft_step=0.001)
        self.now = 0.0
        self.scale = scale
        self.num_blocks = 3
        self.groups: tuple[BlockGroup, ...] = ONE_GROUP
        self.computed: set[tuple[str, int]] = set()
        self.requests: set[Request] = set()
        self.forgotten: set[Request] = set()
        self.first_draft = 0.0  # seconds that it takes more
        self.hasty = 0  # every so manieth step takes half as long
        self.steps = 0
        self.first_steps = 1.0  # how many times as long the first step of a size takes
        self.sizes: set[tuple[int, int]] = set()
        self.drafted: list[list[int]] = []
        self._noise = noise
        self._random = random.Random(2)

    def clock(self) -> float:
        return self.now

    def execute(self, batch: Batch) -> BatchResult:
        assert batch.num_decodes == len(batch.sequences) <= self.config.max_num_seqs
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        sizes = [s.num_drafted for s in batch.sequences]
        assert sizes == sorted(sizes)
        assert max(sizes) <= self.config.num_speculative_tokens
        for sequence in batch.sequences:
            assert sequence.end <= self.max_model_len
            assert sequence.start == len(sequence.request.token_ids) - 1
            for table in sequence.request.tables.groups:
                assert len(table) * self.config.block_size >= sequence.end
                assert max(table) < self.num_blocks
            self.requests.add(sequence.request)
        self.steps += 1
        self.drafted.append(sizes)
        seconds = self.costs.verify_seconds(len(sizes), batch.num_tokens)
        size = len(sizes), batch.num_tokens
        if size not in self.sizes:
            self.sizes.add(size)
            seconds *= self.first_steps
        if self.hasty and self.steps % self.hasty == 0:
            seconds /= 2.0
        return BatchResult([[0]] * len(sizes), self._spend(seconds))

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        for request in requests:
            assert request.num_computed_tokens == len(request.token_ids) - 1
        self.now, self.first_draft = self.now + self.first_draft, 0.0
        self._spend(self.costs.draft_seconds(len(requests), max(limits)))
        return [Draft([0] * limit) for limit in limits]

    def forget(self, request: Request) -> None:
        self.forgotten.add(request)

    def _spend(self, seconds: float) -> float:
        seconds *= self.scale * (1.0 + self._noise * self._random.random())
        self.now += seconds
        return seconds


class LookUps(Machine):
    """Drafts are looked up."""

    costs_device = False


def measured(
    config: EngineConfig, max_model_len: int = 2048, noise: float = 0.0, scale: float = 1.0
) -> tuple[MeasuredCosts | None, Machine]:
    machine = Machine(config, max_model_len, noise, scale)
    costs = measure_costs(machine, machine, config, max_model_len, clock=machine.clock)
    return costs, machine


def agree(
    costs: MeasuredCosts, machine: Machine, counts: Sequence[int], drafted: Sequence[int]
) -> None:
    """Steps of so many sequences, with so many drafted tokens each, are told as they are."""
    for count in counts:
        for each in drafted:
            size = count, count * (1 + each)
            expected = machine.costs.verify_seconds(*size)
            assert costs.verify_seconds(*size) == pytest.approx(expected)


def test_what_was_measured_is_told_and_the_rest_lies_between() -> None:
    config = EngineConfig(max_num_seqs=64, num_speculative_tokens=8)
    costs, machine = measured(config)
    assert isinstance(costs, LearningCosts)
    assert isinstance(costs, UncertainCosts)
    truth = machine.costs
    agree(costs, machine, (1, 4, 16, 64), (0, 1, 2, 8))
    for count, tokens in ((3, 7), (10, 40), (40, 60), (64, 65), (50, 400)):
        expected = truth.verify_seconds(count, tokens)
        assert costs.verify_seconds(count, tokens) == pytest.approx(expected, rel=0.15)
    for count, size in ((1, 1), (1, 4), (7, 8), (64, 3)):
        assert costs.draft_seconds(count, size) == pytest.approx(truth.draft_seconds(count, size))
    assert machine.now < 4.5
    assert machine.requests
    assert machine.requests <= machine.forgotten
    assert all(r.state is RequestState.FINISHED for r in machine.requests)


def test_drafts_are_measured_as_they_will_be() -> None:
    # A model drafts for everybody; look-ups find whole drafts for some.
    config = EngineConfig(max_num_seqs=16, num_speculative_tokens=4)
    for kind in (Machine, LookUps):
        machine = kind(config, 2048)
        assert measure_costs(machine, machine, config, 2048, clock=machine.clock) is not None
        some = [sizes for sizes in machine.drafted if len(sizes) == 16 and sum(sizes) == 16]
        assert some
        expected = [1] * 16 if kind is Machine else [0] * 12 + [4] * 4
        assert all(sizes == expected for sizes in some)


def test_a_first_draft_that_compiles_kernels_leaves_time_for_the_rest() -> None:
    config = EngineConfig(max_num_seqs=64, num_speculative_tokens=5)
    machine = Machine(config, 2048)
    machine.first_draft = 60.0
    costs = measure_costs(machine, machine, config, 2048, clock=machine.clock)
    assert costs is not None
    truth = machine.costs
    assert costs.verify_seconds(64, 128) == pytest.approx(truth.verify_seconds(64, 128))
    assert costs.draft_seconds(64, 5) == pytest.approx(truth.draft_seconds(64, 5))
    assert 60.0 < machine.now < 65.0


def test_single_steps_that_take_less_do_not_tell_what_steps_take() -> None:
    config = EngineConfig(max_num_seqs=4, num_speculative_tokens=5)
    machine = Machine(config, 2048)
    machine.hasty = 9  # of seven sizes in turns, it meets one after the other
    costs = measure_costs(machine, machine, config, 2048, clock=machine.clock)
    assert costs is not None
    agree(costs, machine, (1, 2, 4), (0, 1, 2, 5))


def test_the_first_steps_of_a_row_do_not_count() -> None:
    config = EngineConfig(max_num_seqs=64, num_speculative_tokens=5)
    machine = Machine(config, 2048)
    machine.first_steps = 2.0
    costs = measure_costs(machine, machine, config, 2048, clock=machine.clock)
    assert costs is not None
    agree(costs, machine, (1, 2, 4, 8, 16, 64), (0, 1, 5))


def test_noise_does_not_make_more_cost_less() -> None:
    costs, _ = measured(EngineConfig(max_num_seqs=32, num_speculative_tokens=8), noise=1.0)
    assert costs is not None
    for count in (1, 5, 16, 32):
        seconds = [costs.verify_seconds(count, count + extra) for extra in range(8 * count)]
        assert (np.diff(seconds) >= -1e-12).all()


def test_a_slow_model_is_measured_in_little_time() -> None:
    # A step takes half a second: only the smallest are run.
    costs, machine = measured(EngineConfig(max_num_seqs=64), scale=100.0)
    assert costs is not None
    assert machine.now < 20
    assert costs.verify_seconds(64, 256) >= costs.verify_seconds(1, 5)


@pytest.mark.parametrize("max_model_len", [2, 3, 5, 12, 100])
@pytest.mark.parametrize("budget", [2, 5, 9, 2048])
def test_small_caches_and_budgets(max_model_len: int, budget: int) -> None:
    config = EngineConfig(
        max_num_seqs=min(budget, 8), max_num_batched_tokens=budget, num_speculative_tokens=6
    )
    costs, _ = measured(config, max_model_len)
    assert (costs is None) == (max_model_len == 2)


def test_a_lone_row_counts_sequences_as_tokens() -> None:
    grid = CostGrid()
    for size, seconds in ((0.0, 1.0), (1.0, 1.0), (3.0, 3.0)):
        grid.add(1, size, seconds)
    assert grid.seconds(1, 2.0) == 2.0
    assert grid.seconds(2, 0.0) == 1.0
    assert grid.seconds(2, 1.0) == 3.0
    assert grid.seconds(1, 5.0) == 5.0
    assert len(grid) == 3


def test_steps_are_corrected_by_what_they_take() -> None:
    corrections = VerifyCorrections()
    for _ in range(100):
        corrections.learn(8, 0, 1.5)
        corrections.learn(8, 16, 3.0)
    assert corrections.factor(8, 0) == pytest.approx(1.5, rel=0.03)
    assert corrections.factor(8, 16) == pytest.approx(3.0, rel=0.03)
    assert 1.5 < corrections.factor(8, 1000) < 3.0  # nothing is known of it but the size
    assert corrections.factor(64, 0) == 1.0
    for _ in range(3000):
        corrections.learn(8, 0, 1.5)
    # Not run for long: nothing is sure about it any more.
    assert corrections.factor(8, 16) < 2.0
    assert corrections.factor(8, 0) == pytest.approx(1.5, rel=0.03)


def test_what_steps_take_longer_without_drafts_they_do_with_them_until_it_is_seen() -> None:
    corrections = VerifyCorrections()
    for _ in range(100):
        corrections.learn(64, 0, 1.5)
    # Two seconds, of which one would be without drafts: half a second more, and not a whole one.
    assert corrections.factor(64, 100, plain_share=0.5) == pytest.approx(1.25)
    for _ in range(30):
        corrections.learn(64, 0, 1.5)
        corrections.learn(64, 100, 1.5, plain_share=0.5)
    assert corrections.factor(64, 100, plain_share=0.5) == pytest.approx(1.5, rel=0.03)
    for _ in range(100):
        corrections.learn(8, 0, 0.8)
    assert corrections.factor(8, 20, plain_share=0.5) == pytest.approx(0.8)


def test_the_uncertainty_is_that_of_comparisons() -> None:
    generator = random.Random(3)
    corrections = VerifyCorrections()
    ratios, claimed = [], []
    assert corrections.uncertainty(8) == 0.0
    for step in range(6000):
        corrections.learn(8, 8 * (step % 2), np.exp(generator.gauss(0.0, 0.2)))
        if step > 200:
            ratios.append(np.log(corrections.factor(8, 8) / corrections.factor(8, 0)))
            claimed.append(corrections.uncertainty(8))
    assert 0.6 < np.mean(claimed) / np.std(ratios) < 1.6


def test_less_is_hoped_of_drafts_the_more_steps_had_some() -> None:
    corrections = VerifyCorrections()
    untried = corrections.hope(8)
    assert 0.0 < untried < 0.2
    for _ in range(5):
        corrections.learn(8, 0, 1.0)
    assert corrections.hope(8) == untried
    corrections.learn(9, 1, 1.0)
    assert 0.4 * untried < corrections.hope(8) < 0.6 * untried
    for _ in range(30):
        corrections.learn(8, 16, 1.0)
    assert corrections.hope(8) < 0.05 * untried
    assert corrections.hope(64) == untried


def test_a_slow_while_is_not_blamed_on_the_steps_that_it_meets() -> None:
    corrections = VerifyCorrections()
    for _ in range(50):
        corrections.learn(8, 0, 1.0)
        corrections.learn(8, 8, 1.0)
    for _ in range(30):
        corrections.learn(8, 8, 2.0)
    assert corrections.factor(8, 8) / corrections.factor(8, 0) < 1.3
    assert corrections.factor(8, 0) > 1.5


def test_one_outlier_does_not_settle_a_cost() -> None:
    corrections = VerifyCorrections()
    for _ in range(50):
        corrections.learn(1, 4, 1.0)
    corrections.learn(1, 4, 1000.0)
    assert corrections.factor(1, 4) < 1.5


def test_drafting_is_corrected_by_its_mean() -> None:
    corrections = DraftCorrections()
    assert corrections.factor(4) == 1.0
    # Nine of ten take what was expected, one ten times as much.
    for step in range(2000):
        corrections.learn(4, 0.01, 0.1 if step % 10 == 0 else 0.01)
    assert corrections.factor(4) == pytest.approx(1.9, rel=0.1)


def test_curves() -> None:
    costs = Roofline()
    curves = CostCurves(costs)
    curve = curves.verify(10, 100)
    assert len(curve) == 101
    for drafted in (0, 1, 2, 3, 4, 24, 64, 100):
        assert curve[drafted] == pytest.approx(costs.verify_seconds(10, 10 + drafted))
    assert len(curves.verify(10, 5)) == 6
    assert len(curves.verify(10, 200)) == 201
    drafting = CostCurves(Roofline(draft_step=1.0, draft_request=0.5)).draft(6, 3)
    assert drafting.tolist() == [0.0, 4.5, 6.0, 7.5, 9.0, 10.5, 12.0]


def test_ladder() -> None:
    assert ladder(0) == (0,)
    assert ladder(1) == (0, 1)
    assert ladder(5) == (0, 1, 2, 3, 4, 5)
    assert ladder(20) == (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)


def test_control_steps_are_seldom() -> None:
    controls = ControlSteps()
    drafted = 0
    for _ in range(5000):
        if controls.due(3):
            controls.observe(3, 0)
        else:
            drafted += 1
            controls.observe(3, 5)
    assert 5000 * 0.99 < drafted < 5000
    assert not controls.due(4)
    # Steps that have none anyway do as well.
    other = ControlSteps()
    for step in range(100):
        assert not other.due(1)
        other.observe(1, step % 5)
