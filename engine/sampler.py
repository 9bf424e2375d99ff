"""From logits to the next tokens of a batch, all sequences at once.

A request's choice depends on its own logits, its seed and its position, never on what runs beside
it or on how often it was preempted: chance is one uniform number per (seed, position), turned into
a token by inverting the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request, SamplingParams, TokenLogprobs
from engine.sampled_row import SampledRow
from engine.sampling_logprobs import WantedLogprobs
from engine.sampling_penalties import LogitChanges, logit_changes
from engine.sampling_staging import Slot, Staging
from engine.uniform import request_seed, uniforms
from kernels import sampling
from kernels.sampling import likeliest


@dataclass(slots=True)
class SampledTokens:
    """One token per row, and log-probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class PendingTokens:
    """Tokens that the device may still be choosing.

    Attributes:
        tokens: int64 [S] on the logits' device, for work that is queued behind the choice.
    """

    def __init__(
        self,
        tokens: Tensor,
        results: Sequence[Tensor],
        wanted: WantedLogprobs,
        staging: Staging | None = None,
        slot: Slot | None = None,
    ) -> None:
        self.tokens = tokens
        self._results = results
        self._wanted = wanted
        self._staging, self._slot = staging, slot
        self._sampled: SampledTokens | None = None

    def wait(self) -> SampledTokens:
        """The tokens on the host; waits until they are chosen. May be called again."""
        if self._sampled is None:
            if self._slot is not None:
                self._slot.wait()
            token_ids: list[int] = self._results[0].tolist()
            computed = self._results[1:]
            self._sampled = SampledTokens(
                token_ids, self._wanted.records(token_ids, computed) if computed else []
            )
            if self._staging is not None and self._slot is not None:
                self._staging.release(self._slot)
            self._results, self._slot = (), None
        return self._sampled


class Sampler:
    """Chooses tokens; `seed` is for requests that have none of their own."""

    def __init__(self, seed: int, eos_token_ids: Sequence[int]) -> None:
        self.seed = seed
        self._eos = tuple(eos_token_ids)
        self._staging: Staging | None = None

    def sample(self, logits: Tensor, requests: Sequence[SampledRow]) -> SampledTokens:
        """Choose the next token of each request, and wait for it: see `launch`."""
        return self.launch(logits, requests).wait()

    def launch(
        self,
        logits: Tensor,
        requests: Sequence[SampledRow],
        greedy: Tensor | None = None,
        settled: Mapping[int, int] | None = None,
    ) -> PendingTokens:
        """Choose the next token of each request, without waiting for a GPU that has the kernels.

        logits: float [S, vocabulary], row i for requests[i]; may be changed in place, and must not
        be by others before `PendingTokens.wait`, except behind the choice on the same stream. A row
        of NaN gives some token of the vocabulary. greedy: int64 [S], the likeliest tokens where
        they are known already. settled: tokens of single rows that were chosen otherwise.
        """
        changes = logit_changes(requests, logits.shape[1], self._eos)
        chance = max(request.sampling.temperature for request in requests) > 0.0
        if sampling.on_device(logits):
            return self._launch_on_device(logits, requests, changes, greedy, chance, settled)
        wanted = WantedLogprobs.of(requests)
        raw = logits
        if changes is not None:
            logits = _changeable(logits, bool(wanted.rows))
            arrays = (changes.places, changes.factors, changes.amounts)
            sampling.change_logits(logits, *(torch.from_numpy(a).to(logits.device) for a in arrays))
        if chance:
            tokens = sampling.draw(logits, self._parameters(requests))
        else:
            tokens = greedy if greedy is not None and changes is None else likeliest(logits)
        if settled:
            tokens = _with_settled(tokens, settled)
        results = [tokens]
        if wanted.rows:
            some = None
            if len(wanted.rows) < len(requests):
                some = torch.tensor(wanted.rows, device=raw.device)
            results += wanted.compute(raw, tokens, some)
        return PendingTokens(tokens, results, wanted)

    def probabilities(self, logits: Tensor, requests: Sequence[SampledRow]) -> Tensor:
        """What each request's next token is drawn from; logits [S, vocabulary] are not changed.

        Returns float32 [S, vocabulary]; see `kernels.sampling.probabilities`.
        """
        changes = logit_changes(requests, logits.shape[1], self._eos)
        if changes is not None:
            logits = _changeable(logits, keep=True)
            arrays = (changes.places, changes.factors, changes.amounts)
            sampling.change_logits(logits, *(torch.from_numpy(a).to(logits.device) for a in arrays))
        return sampling.probabilities(logits, self._parameters(requests))

    def request_seed(self, request: Request) -> int:
        """The seed of a request's chance."""
        return request_seed(request.sampling.seed, self.seed, request.request_id)

    def warm_up(self, logits: Tensor) -> None:
        """Have the kernels for logits like these [S, vocabulary] compiled; they are not changed."""
        if not sampling.on_device(logits):
            return
        for params in (SamplingParams(top_k=1), SamplingParams(repetition_penalty=2.0)):
            requests = [Request("warm-up", [0], params, 0.0)] * len(logits)
            self.sample(logits.clone(), requests)

    def _launch_on_device(
        self,
        logits: Tensor,
        requests: Sequence[SampledRow],
        changes: LogitChanges | None,
        greedy: Tensor | None,
        chance: bool,
        settled: Mapping[int, int] | None,
    ) -> PendingTokens:
        """The same with all that the host knows in one copy, and all results in others behind."""
        if self._staging is None or self._staging.device != logits.device:
            self._staging = Staging(logits.device)
        slot = self._staging.take()
        wanted = WantedLogprobs.of(requests)
        arrays: list[NDArray[np.generic]] = []
        if changes is not None:
            arrays += [changes.places, changes.factors, changes.amounts]
        if chance:
            arrays.append(sampling.pack(self._parameters(requests), logits.shape[1]))
        some_report = 0 < len(wanted.rows) < len(requests)
        if some_report:
            arrays.append(np.array(wanted.rows, dtype=np.int64))
        uploaded = slot.upload(arrays) if arrays else []
        some = uploaded.pop() if some_report else None
        packed = uploaded.pop() if chance else None
        raw = logits
        if changes is not None:
            logits = _changeable(logits, bool(wanted.rows))
            sampling.change_logits(logits, *uploaded)
        if packed is not None:
            tokens = sampling.draw_packed(logits, packed)
        else:
            tokens = greedy if greedy is not None and changes is None else likeliest(logits)
        if settled:
            tokens = _with_settled(tokens, settled)
        results = [tokens]
        if wanted.rows:
            results += wanted.compute(raw, tokens, some)
        return PendingTokens(tokens, slot.download(results), wanted, self._staging, slot)

    def _parameters(self, requests: Sequence[SampledRow]) -> sampling.DrawParameters:
        params = [request.sampling for request in requests]
        return sampling.DrawParameters(
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            uniforms(
                [request_seed(r.sampling.seed, self.seed, r.request_id) for r in requests],
                [r.num_tokens for r in requests],
            ).tolist(),
        )


def _with_settled(tokens: Tensor, settled: Mapping[int, int]) -> Tensor:
    """The tokens with some rows' others in their places."""
    rows = torch.tensor(list(settled), device=tokens.device)
    values = torch.tensor(list(settled.values()), dtype=tokens.dtype, device=tokens.device)
    return tokens.index_put((rows,), values)


def _changeable(logits: Tensor, keep: bool) -> Tensor:
    """Contiguous float32 logits that may be changed; others than the given ones if these stay."""
    changeable = logits.float().contiguous()
    return changeable.clone() if keep and changeable is logits else changeable
