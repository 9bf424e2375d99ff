"""A model's kernels are measured once, within the budget, and whoever is stopped goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import kernel_tuning
from engine.errors import EngineError, EnvironmentLacks
from engine.kernel_tuning import Progress, TuningReport, tune_decoder, tuning_notes
from engine.models.block import Mlp
from engine.models.decoder import Decoder
from engine.tunable_operations import Sizes, random_cache, row_ladder, tunable_operations
from kernels import ops
from kernels.limits import native_status
from kernels.triton import measure, runtime, tuning, tuning_cache
from kernels.triton.measure import Operation, Timing
from kernels.triton.runtime import INTERPRETED
from kernels.triton.tuning import Choice, Problem
from tests.engine.tiny_models import make_tiny

DEFAULT, FAST = Choice("default"), Choice("fast")
SIZES = Sizes(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_sizes=(8, 16))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_tiny("gemma2", tmp_path_factory.mktemp("gemma2")).decoder()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("moe")).decoder()


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linear layers that ask for a choice, as those of a GPU do, with a state of their own."""
    native_status()  # the CPU's own kernels, too, are found by this variable
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_state", tuning._State())
    tuning.announce("linear", lambda problem, facts: [DEFAULT, FAST])
    tuning.announce("attention", lambda problem, facts: [DEFAULT, FAST])
    linear, attention = ops.linear, ops.paged_attention

    def asking_linear(x: Tensor, weight: Any) -> Tensor:
        problem = Problem("linear", (tuning.round_rows(len(x)), *weight.shape))
        tuning.choice_for(problem, DEFAULT, INTERPRETED)
        return linear(x, weight)

    def asking_attention(q: Tensor, cache: Any, metadata: Any, *rest: Any) -> Tensor:
        sizes = (len(q), metadata.block_tables.shape[1] * cache.block_size, cache.block_size)
        tuning.choice_for(Problem("attention", sizes), DEFAULT, INTERPRETED)
        return attention(q, cache, metadata, *rest)

    monkeypatch.setattr(ops, "linear", asking_linear)
    monkeypatch.setattr(ops, "paged_attention", asking_attention)


class Timer:
    """Says that `fast` takes half as long; counts what it times."""

    def __init__(self) -> None:
        self.timed: list[dict[Problem, Choice]] = []

    def __call__(self, operation: Operation) -> Callable[[], Timing]:
        asked = kernel_tuning.problems_of(operation)
        self.timed.append(asked)
        return lambda: Timing.of([0.5 if FAST in asked.values() else 1.0])


def restarted() -> None:
    """As a new process finds it: what is on disk, and nothing else."""
    tuning.use(tuning_cache.load(INTERPRETED), INTERPRETED)


def test_everything_is_measured_once_and_kept(decoder: Decoder) -> None:
    seen: list[Progress] = []
    report = tune_decoder(decoder, SIZES, 60.0, Timer(), seen.append)
    found = tuning_cache.entries(INTERPRETED)
    assert len(report.outcomes) == len(report.improved) == len(found) > 20
    assert (report.failures, report.left) == ([], 0)
    assert seen[-1].done == seen[-1].total == len(tunable_operations(decoder, SIZES))
    shapes = {problem.sizes[1:] for problem in found if problem.kernel == "linear"}
    layer = decoder.layers[0]
    assert isinstance(layer.mlp, Mlp)
    weights = [layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down, decoder.head]
    assert shapes == {weight.shape for weight in weights}
    head_rows = {p.sizes[0] for p in found if p.sizes[1:] == decoder.head.shape}
    assert head_rows == {1, 2, 4}  # only tokens that are sampled go through the head
    rows = {p.sizes[0] for p in found if p.sizes[1:] == layer.qkv.shape}
    assert rows == {1, 2, 4, 8, 16}
    decodes = {p.sizes for p in found if p.kernel == "attention" and p.sizes[0] <= 4}
    assert decodes == {(batch, 64, size) for batch in (1, 2, 4) for size in (8, 16)}
    restarted()
    assert tuning.measured(next(iter(found)), INTERPRETED) == FAST
    timer = Timer()
    again = tune_decoder(decoder, SIZES, 60.0, timer)
    assert (again.outcomes, timer.timed) == ([], [])
    assert again.known >= len(found)


def test_a_budget_ends_it_and_the_next_one_goes_on(decoder: Decoder) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    first = tune_decoder(decoder, SIZES, 40.0, Timer(), clock=clock)
    assert first.left > 0
    assert 0 < len(first.outcomes) == len(tuning_cache.entries(INTERPRETED))
    restarted()
    second = tune_decoder(decoder, SIZES, 60.0, Timer())
    assert second.left == 0
    assert not {o.problem for o in first.outcomes} & {o.problem for o in second.outcomes}
    stopped = tune_decoder(decoder, SIZES, 60.0, Timer(), should_stop=lambda: True)
    assert stopped == TuningReport(left=len(tunable_operations(decoder, SIZES)))


def test_experts_are_measured_as_one_operation(experts: Decoder) -> None:
    operations = tunable_operations(experts, SIZES)
    names = {operation.name for operation in operations}
    assert {"experts, 1 row", "experts, 16 rows", "head, 4 rows"} <= names
    one = next(t for t in operations if t.name == "experts, 4 rows").make()
    assert len(one.runs) == len(experts.layers)
    assert one.runs[0]().shape == (4, experts.spec.hidden_size)


def test_layers_of_one_shape_are_rotated(decoder: Decoder) -> None:
    operation = tunable_operations(decoder, SIZES)[0].make()
    with torch.inference_mode():
        results = [run() for run in operation.runs]
    layer = decoder.layers[0]
    assert isinstance(layer.mlp, Mlp)
    assert layer.qkv.shape == layer.mlp.gate_up.shape  # of this tiny model
    assert len(results) == 2 * len(decoder.layers)
    assert all(not torch.equal(results[0], other) for other in results[1:])


def test_a_failing_operation_is_told_of_and_the_rest_is_measured(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory\nmuch text")

    monkeypatch.setattr(ops, "paged_attention", out_of_memory)
    report = tune_decoder(decoder, SIZES, 60.0, Timer())
    assert "attention, 1 decode at 64, cache float32: CUDA out of memory" in report.failures
    assert {outcome.problem.kernel for outcome in report.outcomes} == {"linear"}


def test_a_choice_that_breaks_the_gpu_is_not_tried_again(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Breaking(Timer):
        def __call__(self, operation: Operation) -> Callable[[], Timing]:
            timed = super().__call__(operation)
            if FAST in self.timed[-1].values():
                raise RuntimeError("illegal memory access")
            return timed

    monkeypatch.setattr(measure, "_synchronize", broken)
    with pytest.raises(EngineError, match=r"linear .* with fast .*goes on without this choice"):
        tune_decoder(decoder, SIZES, 60.0, Breaking())
    ((problem, entry),) = tuning_cache.entries(INTERPRETED).items()
    assert entry.choice == DEFAULT
    restarted()
    timer = Breaking()
    with pytest.raises(EngineError):
        tune_decoder(decoder, SIZES, 60.0, timer)
    assert all(problem not in asked for asked in timer.timed)


def test_a_note_says_that_defaults_are_used_until_they_were_measured(decoder: Decoder) -> None:
    def notes() -> list[str]:
        with runtime.interpreting():  # the CPU counts as a device of these kernels
            return tuning_notes("m", torch.device("cpu"))

    assert notes() == []
    x = torch.randn(1, decoder.spec.hidden_size)
    ops.linear(x, decoder.layers[0].qkv)
    (note,) = notes()
    assert "default tiles" in note
    assert "autotune doctor --tune-kernels --model m measures" in note
    assert tuning_notes("m", torch.device("cpu")) == []  # a CPU's model has no such kernels
    tune_decoder(decoder, SIZES, 60.0, Timer())
    ops.linear(x, decoder.layers[0].qkv)
    assert notes() == []


def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    with pytest.raises(EnvironmentLacks, match=r"NVIDIA GPU .* PyTorch sees no CUDA GPU"):
        kernel_tuning.check_tunable(torch.device("cpu"))


def test_rows_cover_every_step() -> None:
    assert row_ladder(SIZES) == ([1, 2, 4], [16, 8])
    decode, prefill = row_ladder(Sizes(200, 3000, 4096))
    assert sorted(decode + prefill) == [2**i for i in range(13)]
    assert decode[-1] == 256
    assert row_ladder(Sizes(1, 1, 64)) == ([1], [])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_a_random_cache_has_no_zeros_to_speak_of(dtype: torch.dtype) -> None:
    cache = random_cache((3, 2, 8, 16), dtype, torch.device("cpu"))
    for data in (cache.keys, cache.values):
        assert data.float().isfinite().all()
        assert (data.float() == 0).float().mean() < 0.1
    if cache.is_quantized:
        assert cache.key_scales is not None
        assert (cache.key_scales > 0).all()
