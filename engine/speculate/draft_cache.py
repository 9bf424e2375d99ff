"""Which tokens of which requests a draft model has the keys and values of.

It keeps books of its own, beside the engine's: a sequence for each request that it was asked about,
on blocks of a pool of its own. A sequence follows its request lazily. What the model drafted lies
behind what the request had then; if the request went another way, it is computed over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from engine.blocks import BlockPool
from engine.request import Request

# So many tokens of a sequence take about as long as one.
GO_ALONG = 16


@dataclass(slots=True, eq=False)
class DraftedSequence:
    """A request as the draft model sees it.

    `own` has the request's tokens, the very list, and blocks of the draft's cache. The keys and
    values of the first `num_computed` tokens are in it; behind the first `num_known` of the
    request's tokens come those of `drafted`, which the model guessed.
    """

    request: Request
    own: Request
    num_known: int = 0
    drafted: list[int] = field(default_factory=list)

    @property
    def num_computed(self) -> int:
        """Tokens of the request whose keys and values are in the draft's cache."""
        return self.own.num_computed_tokens

    @property
    def num_lacking(self) -> int:
        """Tokens to compute until the next one can be guessed; at least 1."""
        return self.own.num_pending_tokens

    def settle(self) -> None:
        """Compare what was guessed with what came, and keep what agrees.

        The last token is computed again even if it is there: what follows it must be guessed.
        """
        tokens = self.request.token_ids
        count = self.num_known
        if self.drafted:
            for guess, token in zip(self.drafted, tokens[count:], strict=False):
                if guess != token:
                    break
                count += 1
            self.drafted.clear()
        self.computed(min(count, len(tokens) - 1))

    def followed_by(self, guesses: Sequence[int]) -> None:
        """Note that tokens were drafted: all but the last of them are computed."""
        self.computed(len(self.request.token_ids))
        self.drafted[:] = guesses[:-1]

    def computed(self, count: int) -> None:
        """Note that the keys and values of the first `count` tokens of the request are there."""
        self.num_known = self.own.num_computed_tokens = count


class DraftCache:
    """The sequences of a draft model, on the blocks of `pool`, which are all of one group."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._sequences: dict[Request, DraftedSequence] = {}  # those asked about last come last

    def __len__(self) -> int:
        return len(self._sequences)

    def take(
        self, request: Request, num_drafted: int, asked: Collection[Request]
    ) -> DraftedSequence | None:
        """The sequence of a request, with blocks for `num_drafted` tokens beyond its own.

        None where there is no room, even without the sequences of requests that are not `asked`
        about now.
        """
        sequence = self._sequences.pop(request, None)
        # The last of the drafted tokens is not computed.
        num_tokens = len(request.token_ids) + num_drafted - 1
        if sequence is None:
            sequence = self._new(request)
            while not self._begin(sequence, num_tokens):
                if not self._evict(asked):
                    return None
        else:
            sequence.settle()
            while not self.pool.extend(sequence.own.tables, num_tokens):
                if not self._evict(asked):
                    self.pool.free(sequence.own.tables)
                    return None
        self._sequences[request] = sequence
        self.register(sequence)
        return sequence

    def lacking(self, request: Request) -> int:
        """Tokens of a request whose keys and values are not here, but for its last.

        Of a request that is new here some may be found, as others have the same prefix; how many is
        known when it is taken in. A few tokens go along with the last one and count as none.
        """
        sequence = self._sequences.get(request)
        known = 0
        if sequence is not None:
            known = sequence.num_known + len(sequence.drafted)
        lacking = len(request.token_ids) - 1 - known
        return lacking if lacking > GO_ALONG else 0

    def register(self, sequence: DraftedSequence) -> None:
        """Let other requests find the blocks that the request's own tokens fill."""
        own, pool = sequence.own, self.pool
        if own.num_computed_tokens // pool.block_size > own.tables.num_registered:
            pool.register(own.tables, own.token_ids, own.num_computed_tokens)

    def forget(self, request: Request) -> None:
        """Give a request's blocks back; what they hold may still be found."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.pool.free(sequence.own.tables)

    def clear(self) -> None:
        """Forget all requests."""
        for request in list(self._sequences):
            self.forget(request)

    def check_integrity(self) -> None:
        """Check that the blocks' books add up.

        Raises:
            BlockPoolCorrupt: they do not.
        """
        self.pool.check_integrity(s.own.tables for s in self._sequences.values())

    def _new(self, request: Request) -> DraftedSequence:
        own = Request(
            request.request_id,
            request.token_ids,
            request.sampling,
            request.arrival,
            tables=self.pool.new_tables(request.cache_salt),
        )
        own.num_prompt_tokens = request.num_prompt_tokens
        return DraftedSequence(request, own)

    def _begin(self, sequence: DraftedSequence, num_tokens: int) -> bool:
        """Give a new sequence its blocks, those that are found among them; whether it could."""
        own, pool = sequence.own, self.pool
        prefix = pool.match_prefix(own.tables, own.token_ids)
        if not pool.allocate(own.tables, prefix, num_tokens):
            return False
        sequence.computed(prefix.num_blocks * pool.block_size)
        return True

    def _evict(self, asked: Collection[Request]) -> bool:
        """Forget the request that was asked about longest ago and is not now; False if none."""
        for request in self._sequences:
            if request not in asked:
                self.forget(request)
                return True
        return False
