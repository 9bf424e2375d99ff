"""What drafts beside one model: its weights, its cache, and what it is told after each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor

from engine.batch import ScheduledSequence
from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.packed_step import StepHeader
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.draft_model import DraftModel, bytes_per_token
from engine.speculate.hidden_states import HiddenStates
from engine.speculate.load_draft import load_draft
from engine.speculate.measured_costs import MeasuredCosts, MeasuredRunner, measure_costs
from engine.speculate.medusa import Medusa
from engine.speculate.medusa_checkpoint import load_medusa
from engine.speculate.medusa_heads import MedusaHeads
from engine.speculate.ngram import LookupProposer, NgramProposer
from engine.speculate.speculator import Speculator
from engine.speculate.suffix import SuffixProposer
from engine.step_in_flight import Accepted

_Proposer: TypeAlias = LookupProposer | DraftModel | Medusa
# Moves keys and values between slots, by lists of sources and targets.
Move: TypeAlias = Callable[[list[int], list[int]], None]


class Drafting:
    """Drafts for one decoder, as its config says; every rank has one.

    `take` what a config needs before the KV cache is sized, `allocate` beside it, and `begin` when
    steps can run. `speculator` is what an engine asks for drafts: only the first rank has one.

    Args:
        decoder: the model that verifies.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, decoder: Decoder, eos_token_ids: Sequence[int]) -> None:
        self._target = decoder
        self._eos = tuple(eos_token_ids)
        self._taken: tuple[str, str | None] = ("none", None)
        self._draft: Decoder | None = None
        self._heads: MedusaHeads | None = None
        self._states: HiddenStates | None = None
        self._proposer: _Proposer | None = None
        # What steps take depends on little else; the rest is learned while requests run.
        self._costs: dict[tuple[object, ...], MeasuredCosts | None] = {}
        self._block_size = 0
        self.bytes_per_token = 0
        """Bytes that a token takes in the draft's own cache, on this rank."""
        self.speculator: Speculator | None = None

    def take(self, config: EngineConfig) -> None:
        """Load what a config needs, and let go of what it does not.

        Raises:
            ConfigError: it does not fit the model.
            ModelError: it is missing or broken.
            EnvironmentLacks: no memory.
        """
        method, decoder = config.speculative_method, self._target
        wanted = method, config.speculative_model
        if wanted != self._taken:
            self._taken = ("none", None)
            self._draft = self._heads = None
            if method == "draft_model":
                self._draft = load_draft(
                    config, decoder.spec, config.model, decoder.device, decoder.ranks
                )
            elif method == "medusa" and decoder.ranks.rank == 0:
                self._heads = load_medusa(config, decoder)
            self._taken = wanted
        draft = self._draft
        self.bytes_per_token = 0 if draft is None else bytes_per_token(draft, config)

    def allocate(self, config: EngineConfig, max_model_len: int, num_blocks: int) -> None:
        """Make what drafts, with a cache of so many blocks if it needs one.

        Raises:
            EnvironmentLacks: no memory.
        """
        self._block_size = config.block_size
        self._states = None
        method = config.speculative_method
        if method == "ngram":
            self._proposer = NgramProposer(config)
        elif method == "suffix":
            self._proposer = SuffixProposer(config)
        elif self._draft is not None:
            self._proposer = DraftModel(self._draft, config, max_model_len, num_blocks, self._eos)
        elif self._heads is not None:
            self._states = HiddenStates()
            sees_all = not any(self._target.spec.layer_windows)
            self._proposer = Medusa(self._heads, self._states, branches=sees_all)

    def release(self) -> None:
        """Give the cache back; weights stay for the next `take` to want or not."""
        self.speculator = self._proposer = self._states = None

    def begin(self, runner: MeasuredRunner, config: EngineConfig, max_model_len: int) -> None:
        """Be ready to draft; measures what steps and drafts take, unless it has been.

        Writes to the first blocks of the cache, so no request may have any.
        """
        proposer = self._proposer
        if proposer is None:
            return
        names = ("speculative_method", "speculative_model", "kv_cache_dtype", "max_num_seqs")
        key = tuple(getattr(config, name) for name in (*names, "num_speculative_tokens"))
        if key not in self._costs:
            if isinstance(proposer, DraftModel):
                # Drafts of what is measured promise little, and must not end early for that.
                proposer.floor = 0.0
            self._costs[key] = measure_costs(runner, proposer, config, max_model_len)
        lacking = proposer.lacking if isinstance(proposer, DraftModel) else None
        lengths = DraftLengths(
            self._costs[key], costs_device=proposer.costs_device, lacking=lacking
        )
        self.speculator = Speculator(proposer, lengths, time.perf_counter)

    def apply_live(self, config: EngineConfig) -> None:
        """Take over `live` knobs."""
        if isinstance(self._proposer, LookupProposer):
            self._proposer.reconfigure(config)
        elif isinstance(self._proposer, DraftModel):
            self._proposer.apply_live(config)

    def follow(self, header: StepHeader, words: Tensor) -> None:
        """Compute a step of the draft model that the first rank has packed, as another one."""
        assert isinstance(self._proposer, DraftModel)
        self._proposer.follow(header, words)

    def follower(
        self, sequences: Sequence[ScheduledSequence], hidden: Tensor, move: Move
    ) -> Callable[[Sequence[Accepted]], None] | None:
        """Whom to tell what a step accepted; hidden [rows, hidden] is valid until the next step.

        None if nothing was drafted.
        """
        if self._states is not None:
            self._states.begin(sequences, hidden.clone() if hidden.is_cuda else hidden)
        if any(s.draft is not None for s in sequences):
            return partial(self._follow, move)
        return None

    def _follow(self, move: Move, accepted: Sequence[Accepted]) -> None:
        states = self._states
        sources: list[int] = []
        targets: list[int] = []
        for entry in accepted:
            sequence, places = entry.sequence, entry.places
            if states is not None and places:
                states.accept(sequence.request, places[-1] + 1, len(places))
            for place, stored in enumerate(places):
                if stored != place:  # it was a branch of a tree
                    sources.append(self._slot(sequence, stored))
                    targets.append(self._slot(sequence, place))
        if sources:
            move(sources, targets)

    def _slot(self, sequence: ScheduledSequence, place: int) -> int:
        """The slot of a drafted token; trees are for models of one group of layers alone."""
        block, offset = divmod(sequence.known + place, self._block_size)
        return sequence.request.tables.groups[0][block] * self._block_size + offset
