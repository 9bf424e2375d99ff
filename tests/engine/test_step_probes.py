"""Probes measure what they say: the right shapes, memory of their own, within the time given."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from engine import step_probes
from engine.models.experts import Experts
from engine.probe_operations import AttentionLayers, RandomRows, own_layers, random_layers
from engine.step_probes import probe_attention, probe_linears, row_ladder
from kernels.ops import ConcatWeight, LinearWeight
from kernels.weights import DenseWeight, Int8Weight
from tests.engine.tiny_models import TinyModel, make_tiny

LONG = 1e9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def _storages(weight: LinearWeight) -> set[int]:
    if isinstance(weight, ConcatWeight):
        return set().union(*(_storages(part) for part in weight.parts))
    return {weight.data.untyped_storage().data_ptr()}


def test_every_method_is_timed_at_every_number_of_rows(tiny: TinyModel) -> None:
    times = probe_linears(tiny.decoder(), "none", ["int8", "int4"], 40, 12, 0.3)
    assert [entry.method for entry in times] == ["none", "int8", "int4"]
    for entry in times:
        assert entry.rows == row_ladder(40) == [1, 2, 4, 8, 12, 16, 24, 32, 40]
        assert len(entry.layers_s) == len(entry.head_s) == len(entry.rows)
        assert all(0 < seconds < 1 for seconds in entry.layers_s + entry.head_s)
        # Beyond the most sampled rows the head's time goes on with the rows.
        at = entry.rows.index(24)
        assert entry.head_s[at] / entry.head_s[at - 1] == pytest.approx(24 / 16)
        # What took longer than more rows did was disturbed.
        assert entry.layers_s == sorted(entry.layers_s)


def test_without_time_only_the_ends_are_timed_and_other_methods_left_out(tiny: TinyModel) -> None:
    ticks = count()
    times = probe_linears(
        tiny.decoder(), "none", ["int8"], 64, 64, 0.01, clock=lambda: float(next(ticks))
    )
    assert [entry.method for entry in times] == ["none"]
    assert times[0].rows == [1, 64]


@pytest.mark.parametrize("method", ["none", "int8", "int4", "nf4", "fp8", "llm_int8"])
def test_random_layers_have_the_shapes_of_the_models_and_memory_of_their_own(
    tiny: TinyModel, method: str
) -> None:
    decoder = tiny.decoder()
    own, made = own_layers(decoder, "none"), random_layers(decoder, method)
    assert made.num_layers == len(made.layers) == len(own.layers) == 3
    seen: set[int] = set()
    for mine, theirs in zip(made.layers, own.layers, strict=True):
        assert mine[0].shape == theirs[0].shape
        assert mine[1].shape == theirs[1].shape
        for weight in mine[:2]:
            assert not seen & _storages(weight)
            seen |= _storages(weight)
    assert made.head.shape == own.head.shape
    assert not _storages(made.head) & _storages(own.head)
    with torch.inference_mode():
        outputs = [run() for run in made.runs(RandomRows(decoder, 5))]
        assert [tuple(out.shape) for out in outputs] == [(5, 64)] * 3
        assert tuple(made.head_run(RandomRows(decoder, 4))().shape) == (4, 128)


def test_a_method_is_measured_in_its_own_form(tiny: TinyModel) -> None:
    decoder = tiny.decoder()
    assert isinstance(random_layers(decoder, "int8").layers[0][0], Int8Weight)
    # The head of a four-bit model is int8, as it is served.
    assert isinstance(random_layers(decoder, "int4").head, Int8Weight)
    assert isinstance(random_layers(decoder, "none").head, DenseWeight)


def test_experts_are_measured_with_their_router(tmp_path: Path) -> None:
    decoder = make_tiny("mixtral", tmp_path).decoder()
    made = random_layers(decoder, "int8")
    assert isinstance(made.layers[0][2], Experts)
    with torch.inference_mode():
        assert tuple(made.runs(RandomRows(decoder, 6))[0]().shape) == (6, decoder.spec.hidden_size)


def test_attention_is_timed_over_every_cache(tiny: TinyModel) -> None:
    dtypes = {"auto": torch.float32, "int8": torch.int8}
    times = probe_attention(tiny.decoder(), dtypes, 8, 96, 4, 0.3)
    assert list(times) == ["auto", "int8"]
    for entry in times.values():
        points = list(zip(entry.sequences, entry.contexts, strict=True))
        assert points == [(1, 32), (1, 96), (2, 32), (2, 96), (4, 32), (4, 96)]
        assert len(points) == len(set(points)) == len(entry.seconds)
        assert all(seconds > 0 for seconds in entry.seconds + entry.chunk_seconds)
        chunks = list(zip(entry.chunk_tokens, entry.chunk_contexts, strict=True))
        assert chunks == [(16, 16), (64, 64)]


def test_without_time_attention_has_its_ends(tiny: TinyModel) -> None:
    ticks = count()
    times = probe_attention(
        tiny.decoder(), {"auto": torch.float32}, 8, 96, 1, 0.01, clock=lambda: float(next(ticks))
    )["auto"]
    assert (times.sequences, times.contexts) == ([1, 1], [32, 96])
    assert times.seconds[0] <= times.seconds[1]
    assert times.chunk_tokens == [16, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_sequences_read_random_pages_and_those_beyond_the_memory_share_them(
    tiny: TinyModel, dtype: torch.dtype
) -> None:
    decoder = tiny.decoder()
    layers = AttentionLayers.make(decoder, dtype, 8, 128)
    assert len(layers.caches) == layers.num_layers == 3
    assert layers.pages == 16
    for cache in layers.caches:
        assert cache.keys.float().std() > 0.1
    with torch.inference_mode():
        # Six sequences of 64 tokens take 48 pages, three times as many as there are.
        outputs = [run() for run in layers.runs(decoder, (1,) * 6, 64)]
    for out in outputs:
        assert tuple(out.shape) == (6, 4, 16)
        assert torch.isfinite(out).all()
        assert out.abs().max() > 0


def test_a_point_that_was_disturbed_is_held_to_what_is_larger_and_smaller() -> None:
    sizes = [(n, c) for n in (1, 2, 4) for c in (10, 100)]
    truth = {(n, c): 1.0 + n + n * c for n, c in sizes}
    for disturbed in sizes:
        points = [
            (n, c, float(n * c), truth[n, c] * (50 if (n, c) == disturbed else 1)) for n, c in sizes
        ]
        for size, seconds in zip(sizes, step_probes._plausible(points), strict=True):
            if size == disturbed:
                assert truth[size] <= seconds <= 12 * truth[size]
            else:
                assert seconds == truth[size]
    calm = [(n, c, float(n * c), truth[n, c]) for n, c in sizes]
    assert step_probes._plausible(calm) == [truth[size] for size in sizes]


def test_what_has_no_room_beside_the_model_is_left_out(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    decoder = tiny.decoder()
    monkeypatch.setattr(step_probes, "random_layers", full)
    times = probe_linears(decoder, "none", ["int8"], 4, 4, 0.1)
    assert [entry.method for entry in times] == ["none"]
    make = AttentionLayers.make

    def only_own(decoder: object, dtype: torch.dtype, *rest: object) -> AttentionLayers:
        return full() if dtype == torch.int8 else make(decoder, dtype, *rest)  # type: ignore[arg-type,return-value,func-returns-value]

    monkeypatch.setattr(AttentionLayers, "make", only_own)
    dtypes = {"auto": torch.float32, "int8": torch.int8}
    assert list(probe_attention(decoder, dtypes, 8, 40, 2, 0.1)) == ["auto"]
    monkeypatch.setattr(AttentionLayers, "make", full)
    assert probe_attention(decoder, dtypes, 8, 40, 2, 0.1) == {}
