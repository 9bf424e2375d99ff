"""Launches: the same tokens as on a CPU, without waiting, several under way at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy import stats

from engine.request import Request, SamplingParams
from engine.sampler import PendingTokens, Sampler
from engine.sampling_staging import Staging
from kernels.triton import runtime

VOCABULARY = 60


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A GPU, or Triton's interpreter on the CPU."""
    if torch.cuda.is_available():
        found = runtime.status(torch.device("cuda"))
        if not found.available:
            pytest.skip(found.reason)
        yield torch.device("cuda")
        return
    from tests.kernels.triton.interpreter import repaired

    with repaired(), runtime.interpreting(), np.errstate(over="ignore"):
        yield torch.device("cpu")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Anything inside that waits for a GPU is an error."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launch(
    sampler: Sampler, logits: torch.Tensor, requests: list[Request], **more: torch.Tensor
) -> PendingTokens:
    with torch.inference_mode(), no_synchronisation():
        return sampler.launch(logits, requests, **more)


def request(i: int, output: tuple[int, ...] = (), **knobs: object) -> Request:
    made = Request(f"r{i}", [1, 2, 3], SamplingParams(**knobs), 0.0)  # type: ignore[arg-type]
    made.token_ids += output
    return made


def mixed_requests() -> list[Request]:
    knobs: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"seed": 4},
        {"seed": 4, "top_p": 0.6, "logprobs": 0},
        {"top_k": 3, "logprobs": 4},
        {"temperature": 2.0, "min_p": 0.05, "frequency_penalty": 1.5, "presence_penalty": -0.7},
        {"temperature": 0.0, "repetition_penalty": 1.9, "min_tokens": 9, "stop_token_ids": (5, 3)},
        {"min_tokens": 9, "stop_token_ids": (7, 10_000), "ignore_eos": True},
        {"temperature": 0.0, "min_tokens": 9, "logprobs": 2},
    ]
    return [request(i, output=(4, 4, 9, 5), **k) for i, k in enumerate(knobs)]


@pytest.mark.parametrize("chosen", [slice(None), slice(0, 1), slice(5, 6), slice(7, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_on_a_cpu(device: torch.device, chosen: slice, dtype: torch.dtype) -> None:
    requests = mixed_requests()[chosen]
    logits = (torch.randn(len(requests), VOCABULARY) * 2).to(dtype)
    logits[:, 11] = 9.0
    sampler = Sampler(3, eos_token_ids=(11, 4))
    pending = launch(sampler, logits.to(device, copy=True), requests)
    assert pending.tokens.dtype == torch.int64
    assert pending.tokens.device.type == device.type
    tokens = pending.tokens.tolist()
    sampled = pending.wait()
    assert sampled.token_ids == tokens
    assert pending.wait() is sampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "runs_on", lambda _: False)
        plain = sampler.launch(logits.clone(), requests)
    assert plain.tokens.tolist() == plain.wait().token_ids == tokens
    assert len(sampled.logprobs) == len(plain.wait().logprobs)
    for ours, theirs in zip(sampled.logprobs, plain.wait().logprobs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert ours.top == pytest.approx(theirs.top, abs=1e-5)


def test_draws_follow_the_distribution(device: torch.device) -> None:
    logits = torch.tensor([0.5, 1.0, -0.3, 0.0, 0.7])
    requests = [request(i, temperature=1.3) for i in range(160)]
    pending = launch(Sampler(9, ()), logits.repeat(len(requests), 1).to(device), requests)
    counts = np.bincount(pending.wait().token_ids, minlength=5)
    expected = torch.softmax(logits.double() / 1.3, 0).numpy() * len(requests)
    assert stats.chisquare(counts, expected).pvalue > 1e-5


def test_several_launches_under_way(device: torch.device) -> None:
    """Each keeps its results until they are read, in any order; memory is used again then."""
    sampler = Sampler(1, ())
    logits = torch.randn(5, 2, VOCABULARY).to(device)
    requests = [request(0, seed=1), request(1, repetition_penalty=1.4)]
    alone = [sampler.launch(x.clone(), requests).wait().token_ids for x in logits]
    launched = [launch(sampler, x.clone(), requests) for x in logits[:3]]
    assert [p.wait().token_ids for p in reversed(launched)] == alone[2::-1]
    del launched
    launch(sampler, logits[3].clone(), requests)  # never waited for
    assert launch(sampler, logits[4].clone(), requests).wait().token_ids == alone[4]


def test_known_likeliest_tokens_are_taken_where_nothing_changes_them(device: torch.device) -> None:
    logits = torch.zeros(2, VOCABULARY, device=device)
    logits[:, 8] = 1.0
    known = torch.tensor([3, 4], device=device)
    greedy = [request(i, temperature=0.0) for i in range(2)]
    sampler = Sampler(0, ())
    assert launch(sampler, logits, greedy, greedy=known).wait().token_ids == [3, 4]
    penalised = [greedy[0], request(1, output=(8,), temperature=0.0, presence_penalty=2.0)]
    assert launch(sampler, logits.clone(), penalised, greedy=known).wait().token_ids == [8, 0]
    drawn = [greedy[0], request(1, top_k=1)]
    assert launch(sampler, logits, drawn, greedy=known).wait().token_ids == [8, 8]


def test_warm_up_leaves_logits(device: torch.device) -> None:
    logits = torch.randn(1, VOCABULARY).bfloat16().to(device)
    before = logits.clone()
    Sampler(0, ()).warm_up(logits)
    assert torch.equal(logits, before)


def test_slots_hold_what_they_are_given() -> None:
    """Arrays of every kind and size, in inference mode and out of it."""
    staging = Staging(torch.device("cpu"))
    slot = staging.take()
    assert staging.take() is not slot
    for size, inference in ((3, True), (50_000, False), (0, True), (9, False)):
        arrays = [
            np.random.default_rng().random((2, size)),
            np.arange(size, dtype=np.int64),
            np.random.default_rng().random(size).astype(np.float32),
        ]
        with torch.inference_mode(mode=inference):
            tensors = slot.upload(arrays)
            copies = slot.download([t + 1 for t in tensors])
        slot.wait()
        for array, tensor, copy in zip(arrays, tensors, copies, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
            np.testing.assert_array_equal(copy.numpy(), array + 1, strict=True)
    staging.release(slot)
    assert staging.take() is slot
