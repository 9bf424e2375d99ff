"""Drafts without chance, accepted where the model chooses the same: the distribution is its own."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.batch import ScheduledSequence
from engine.request import Request, SamplingParams
from engine.sampled_row import sampled_rows
from engine.sampler import Sampler
from engine.speculate.accepted import accepted_places
from engine.speculate.draft import Draft
from kernels import sampling
from tests.engine.speculate.chances import chi_squared

VOCABULARY = 5
DEPTH = 3
PROMPT = [1, 3]
TABLE = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))
CHAINS = [Draft([0, 1, 2, 3]), Draft([4, 4]), Draft([2])]
TREES = [
    Draft([0, 1, 2, 4], [-1, -1, -1, -1]),
    Draft([0, 4, 2, 3], [-1, -1, 0, 2]),
    Draft([3, 3], [-1, 0]),
    Draft([2, 0, 1, 4], [-1, -1, 1, 2]),
]


@pytest.fixture(autouse=True)
def no_collecting() -> Iterator[None]:
    """There are no cycles among so many rows, and looking for them takes long."""
    gc.disable()
    yield
    gc.enable()


def logits_behind(histories: np.ndarray) -> torch.Tensor:
    """float32 [n, vocabulary], by the last two tokens of int64 [n, 2]."""
    return TABLE[histories[:, 1], histories[:, 0]] * 1.5


def exact_joint(params: SamplingParams) -> np.ndarray:
    """Probability of each sequence of `DEPTH` tokens; float64 [vocabulary, ...]."""
    pairs = np.array([divmod(i, VOCABULARY) for i in range(VOCABULARY**2)])
    count = len(pairs)
    parameters = sampling.DrawParameters(
        [params.temperature] * count,
        [params.top_k] * count,
        [params.top_p] * count,
        [params.min_p] * count,
        [0.0] * count,
    )
    step = sampling.probabilities(logits_behind(pairs), parameters).double().numpy()
    joint = np.ones(1)
    last = np.array([PROMPT[0] * VOCABULARY + PROMPT[1]])
    for _ in range(DEPTH):
        joint = (joint[:, None] * step[last]).ravel()
        last = (last[:, None] % VOCABULARY * VOCABULARY + np.arange(VOCABULARY)).ravel()
    return joint


def extend(sampler: Sampler, requests: list[Request], drafts: list[Draft]) -> int:
    """One step for all: what was accepted, and one more, comes behind each; how many were."""
    rows = sampled_rows(
        [
            ScheduledSequence(r, 0, 1 + len(d), True, d)
            for r, d in zip(requests, drafts, strict=True)
        ]
    )
    histories = np.array([row.token_ids[-2:] for row in rows])
    chosen = sampler.sample(logits_behind(histories), rows).token_ids
    first = accepted = 0
    for request, draft in zip(requests, drafts, strict=True):
        places = accepted_places(draft, chosen[first : first + 1 + len(draft)])
        more = chosen[first + (places[-1] + 1 if places else 0)]
        request.token_ids += [draft.token_ids[place] for place in places] + [more]
        accepted += len(places)
        first += 1 + len(draft)
    return accepted


@pytest.mark.parametrize(
    ("kinds", "samples"), [(CHAINS, 30_000), (TREES, 100_000)], ids=["chains", "trees"]
)
def test_joint_distribution(kinds: list[Draft], samples: int) -> None:
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.02)
    rng = random.Random(1)
    sampler = Sampler(seed=3, eos_token_ids=())
    counts = np.zeros(VOCABULARY**DEPTH, dtype=np.int64)
    accepted = 0
    for batch in range(10):
        requests = [
            Request(f"{batch}/{i}", list(PROMPT), params, 0.0) for i in range(samples // 10)
        ]
        while short := [r for r in requests if r.num_output_tokens < DEPTH]:
            accepted += extend(sampler, short, [rng.choice(kinds) for _ in short])
        for request in requests:
            a, b, c = request.output_token_ids[:DEPTH]
            counts[(a * VOCABULARY + b) * VOCABULARY + c] += 1
    assert accepted > samples // 5
    assert chi_squared(counts, exact_joint(params)) > 1e-3
