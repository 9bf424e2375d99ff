"""What proposers that look tokens up would have drafted along recorded answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autotune.predict.drafting import Trace
from engine.config import EngineConfig
from engine.request import Request, RequestState, SamplingParams
from engine.speculate.ngram import NgramProposer
from engine.speculate.proposer import Proposer
from engine.speculate.suffix import SuffixProposer

# More answers' tokens tell nothing more; each takes a look-up.
MOST_DECODES = 12_000
# Longer drafts that are right to their end are drafted again from there.
LONGEST = 24

Text = tuple[str, Sequence[int], Sequence[int]]
"""A request: its id, its prompt, and the tokens that it got."""


def traces(
    texts: Iterable[Text], config: EngineConfig, most_decodes: int = MOST_DECODES
) -> dict[str, Trace]:
    """Drafts by request id, as `config` would have made them; `most_decodes` of them.

    Answers in full, the first of them first, as a request whose end is missing would be taken for
    one whose drafts fare as those of its beginning. Each is drafted as if those before it had left.
    """
    proposer = lookup_proposer(config)
    found: dict[str, Trace] = {}
    decodes = 0
    for name, prompt, output in texts:
        if not output:
            continue
        if decodes >= most_decodes:
            break
        found[name] = _trace(proposer, name, prompt, output)
        decodes += len(output)
    return found


def lookup_proposer(config: EngineConfig) -> Proposer:
    """The proposer that `speculative_method` names.

    Raises:
        ValueError: it does not look tokens up.
    """
    if config.speculative_method == "suffix":
        return SuffixProposer(config)
    if config.speculative_method == "ngram":
        return NgramProposer(config)
    raise ValueError(f"{config.speculative_method} does not look tokens up")


def _trace(proposer: Proposer, name: str, prompt: Sequence[int], output: Sequence[int]) -> Trace:
    request = Request(name, list(prompt), SamplingParams(temperature=0.0, max_tokens=None), 0.0)
    right: list[int] = []
    chances: list[tuple[float, ...]] = []
    for place in range(len(output)):
        if place:
            request.token_ids.append(output[place - 1])
        (draft,) = proposer.propose([request], [LONGEST])
        if draft is None:
            right.append(-1)
            chances.append(())
            continue
        right.append(len(draft.right_path(output[place : place + LONGEST])))
        chances.append(tuple(draft.chances or ()))
    request.token_ids.append(output[-1])
    request.state = RequestState.FINISHED  # from now on others find what it got
    proposer.forget(request)
    return Trace(tuple(right), tuple(chances) if any(chances) else ())
