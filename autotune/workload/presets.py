"""Synthetic workloads for those who have no trace: chat, rag, code, summarize, agent.

Lengths are lognormal, which fits request lengths well enough for a start; medians come from the
sources named with each preset. Where a source gives only means, the median is chosen so that the
mean comes out. All of it is a stand-in: a trace of the real service is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autotune.errors import BadInput
from autotune.workload.arrivals import draw_arrivals
from autotune.workload.rows import Workload, WorkloadRow

# Tokens of a block of shared prefix. System prompts and documents are whole blocks.
PREFIX_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal lengths in tokens: the median, the standard deviation of the log, the most."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length, at least 1."""
        drawn = self.median * math.exp(self.sigma * rng.standard_normal())
        return max(1, min(self.most, round(drawn)))


@dataclass(frozen=True, slots=True)
class Preset:
    """How a kind of traffic looks.

    `own` is the part of a prompt that no other request shares, `output` the answer. Each prompt
    begins with one of `system_prompts` texts of `system_blocks` blocks, then with
    `documents_per_prompt` of `documents` texts of `document_blocks` blocks, some of them asked for
    more often than others (Zipf, exponent 1). With `turns` above 1, requests come in sessions of
    that mean length, and a turn's prompt begins with the whole turn before it.
    """

    help: str
    own: Lengths
    output: Lengths
    system_prompts: int = 0
    system_blocks: int = 0
    documents: int = 0
    document_blocks: int = 0
    documents_per_prompt: int = 0
    turns: float = 1.0
    sessions_at_once: int = 1


PRESETS: Mapping[str, Preset] = {
    # Azure's conversation trace of 2023: medians 1020 in and 129 out, most 14050 and 1000, standard
    # deviation of the log 0.75 (its middle two thirds) and 0.86. 256 of the input's tokens stand
    # for a system prompt.
    "chat": Preset(
        "people talking to an assistant, one of 4 system prompts",
        own=Lengths(764, 0.75, 14050),
        output=Lengths(129, 0.86, 1000),
        system_prompts=4,
        system_blocks=4,
    ),
    # A design, not a measurement: 4 passages of 512 tokens, the usual chunk size, among 200 before
    # a short question.
    "rag": Preset(
        "questions over retrieved passages that recur",
        own=Lengths(60, 0.6, 512),
        output=Lengths(180, 0.6, 1024),
        system_prompts=1,
        system_blocks=4,
        documents=200,
        document_blocks=8,
        documents_per_prompt=4,
    ),
    # Azure's code trace of 2023 as in Splitwise (Patel et al. 2024): medians 1500 in, 13 out.
    "code": Preset(
        "code completion: long context, short answer",
        own=Lengths(1436, 0.9, 7400),
        output=Lengths(13, 1.0, 500),
        system_prompts=1,
        system_blocks=1,
    ),
    # CNN/DailyMail (See et al. 2017): articles of 781 tokens on average, summaries of 56.
    "summarize": Preset(
        "articles to be summarised, nothing shared but the instruction",
        own=Lengths(690, 0.5, 4000),
        output=Lengths(52, 0.4, 256),
        system_prompts=1,
        system_blocks=1,
    ),
    # Mooncake's tool and agent trace: means 8596 in, 182 out. Here sessions of 8 turns on average
    # grow by tool results of 600 tokens in the middle from a system prompt of 1024.
    "agent": Preset(
        "tool-using sessions that grow turn by turn",
        own=Lengths(600, 0.9, 8192),
        output=Lengths(140, 0.7, 2000),
        system_prompts=2,
        system_blocks=16,
        turns=8.0,
        sessions_at_once=16,
    ),
}


def make_preset(
    name: str, num_requests: int, rate: float, *, burstiness: float = 1.0, seed: int = 0
) -> Workload:
    """Draw a synthetic workload; the same arguments draw the same one.

    Args:
        name: one of `PRESETS`.
        num_requests: how many requests.
        rate: mean arrivals in requests per second.
        burstiness: shape of the gaps' Gamma distribution as in `draw_arrivals`; 1 is Poisson.
        seed: of everything drawn.

    Raises:
        BadInput: an unknown name, no requests, or a bad rate or burstiness.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise BadInput(f"{name!r} is not a preset; there are {', '.join(PRESETS)}")
    if num_requests < 1:
        raise BadInput(f"a workload of {num_requests} requests; it must have at least 1")
    # Separate streams, so that another rate or burstiness leaves the lengths as they are.
    lengths, times, texts = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    arrivals = draw_arrivals(num_requests, rate, burstiness, times)
    make = (
        _sessions(preset, lengths, texts) if preset.turns > 1 else _single(preset, lengths, texts)
    )
    gaps = "Poisson" if burstiness == 1 else f"Gamma (burstiness {burstiness:g})"
    return Workload(
        tuple(make(float(arrival)) for arrival in arrivals),
        f"preset {name}",
        "preset",
        (f"synthetic: {preset.help}; {gaps} arrivals at {rate:g} requests/s, seed {seed}",),
    )


def _single(
    preset: Preset, lengths: np.random.Generator, texts: np.random.Generator
) -> Callable[[float], WorkloadRow]:
    """Requests that share no more than system prompts and documents."""
    popularity = 1.0 / np.arange(1, preset.documents + 1)

    def make(arrival: float) -> WorkloadRow:
        ids = _system_prompt(preset, texts)
        if preset.documents:
            chosen = texts.choice(
                preset.documents,
                preset.documents_per_prompt,
                replace=False,
                p=popularity / popularity.sum(),
            )
            for document in chosen:
                first = _first_document(preset) + int(document) * preset.document_blocks
                ids += range(first, first + preset.document_blocks)
        own, output = preset.own.draw(lengths), preset.output.draw(lengths)
        return WorkloadRow(
            arrival,
            len(ids) * PREFIX_BLOCK_TOKENS + own,
            output,
            prefix_ids=tuple(ids),
            prefix_block_tokens=PREFIX_BLOCK_TOKENS,
        )

    return make


@dataclass(slots=True)
class _Session:
    name: str
    ids: list[int]
    tokens: int
    turns_left: int


def _sessions(
    preset: Preset, lengths: np.random.Generator, texts: np.random.Generator
) -> Callable[[float], WorkloadRow]:
    """Turns of sessions: each arrival is the next turn of a random one of those under way.

    A session's context is named by blocks: a block's id, once given, stays, so that a turn's
    prompt begins with all of the turn before it, answer included.
    """
    under_way: list[_Session] = []
    next_id = _first_document(preset)
    started = 0

    def make(arrival: float) -> WorkloadRow:
        nonlocal next_id, started
        while len(under_way) < preset.sessions_at_once:
            ids = _system_prompt(preset, texts)
            turns = int(texts.geometric(1.0 / preset.turns))
            under_way.append(_Session(f"s{started}", ids, len(ids) * PREFIX_BLOCK_TOKENS, turns))
            started += 1
        chosen = int(texts.integers(len(under_way)))
        session = under_way[chosen]
        own, output = preset.own.draw(lengths), preset.output.draw(lengths)
        session.tokens += own
        while len(session.ids) * PREFIX_BLOCK_TOKENS < session.tokens:
            session.ids.append(next_id)
            next_id += 1
        row = WorkloadRow(
            arrival,
            session.tokens,
            output,
            prefix_ids=tuple(session.ids),
            prefix_block_tokens=PREFIX_BLOCK_TOKENS,
            session_id=session.name,
        )
        session.tokens += output
        session.turns_left -= 1
        if session.turns_left == 0:
            under_way.pop(chosen)
        return row

    return make


def _system_prompt(preset: Preset, rng: np.random.Generator) -> list[int]:
    if not preset.system_prompts:
        return []
    first = int(rng.integers(preset.system_prompts)) * preset.system_blocks
    return list(range(first, first + preset.system_blocks))


def _first_document(preset: Preset) -> int:
    """The first block id that is no system prompt's."""
    return preset.system_prompts * preset.system_blocks
