"""What is known of the drafts of any configuration on a traffic, from its loads and its texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.predict.draft_traces import Text, traces
from autotune.predict.drafting import LOOKUP_COST, MEASURED_ERROR, DraftCost, DraftProfile
from autotune.predict.measured_drafts import conditional, measured_drafts, pooled
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_speculation import CONTEXT, Cost
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.speculation_schema import Speculation
from engine.config import EngineConfig

# Whose drafts follow from the tokens of prompts and answers.
LOOKED_UP = ("ngram", "suffix")
# Of fewer answers nothing can be said.
FEWEST_TEXTS = 4
# What the literature has of models that drafts were not measured of, and how little that says:
# Leviathan et al. 2023 (arXiv 2211.17192) measured acceptance of 0.5 to 0.9, Cai et al. 2024
# (arXiv 2401.10774) heads whose accuracy falls with the depth.
GUESSED = {
    "draft_model": (0.7,),
    "medusa": (0.65, 0.6, 0.55, 0.5),
    "ngram": (0.7,),
    "suffix": (0.7,),
}
GUESSED_SHARE = {"ngram": 0.3, "suffix": 0.3}
GUESS_ERROR = 1.2
# Of a step of the model that is drafted for, by each token of a draft; heads draft all at once.
GUESSED_COST = {"draft_model": 0.15, "medusa": 0.15}


@dataclass(frozen=True)
class DraftKnowledge:
    """What loads and their texts tell of drafts.

    `measured` has the profiles of loads that drafted, by `_key`; `texts` are recorded requests, as
    they follow from greedy choices whoever drafts. With `guesses`, drafts that nothing is known of
    fare as the literature says, with an error that says how little that is.
    """

    measured: Mapping[tuple[Any, ...], DraftProfile] = field(default_factory=dict)
    texts: Sequence[Text] = ()
    guesses: bool = False
    _traced: dict[tuple[Any, ...], DraftProfile | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(
        cls, loads: Sequence[tuple[EngineConfig, LoadEvidence]], *, guesses: bool = False
    ) -> DraftKnowledge:
        """From loads and the configs that served them; texts are the first load's that has any."""
        found: dict[tuple[Any, ...], list[DraftProfile]] = {}
        texts: list[Text] = []
        for config, evidence in loads:
            if config.speculative_method != "none":
                profile = measured_drafts(evidence.steps, config, evidence.requests)
                if profile is not None:
                    found.setdefault(_key(config), []).append(profile)
            texts = texts or _texts(evidence)
        return cls({key: pooled(profiles) for key, profiles in found.items()}, texts, guesses)

    def with_dry_run(self, found: Speculation) -> DraftKnowledge:
        """With what a profile's dry run of lookups says, where its texts are not there."""
        survival = [p.accepted / p.drafted for p in found.positions if p.drafted]
        if self.texts or not survival or found.num_requests < FEWEST_TEXTS:
            return self
        config = EngineConfig(
            speculative_method="ngram",
            prompt_lookup_min=found.min_ngram,
            prompt_lookup_max=found.max_ngram,
        )
        profile = DraftProfile(
            conditional(survival), found.hit_share, found.hit_run, error=MEASURED_ERROR
        )
        return dataclasses.replace(self, measured={_key(config): profile, **self.measured})

    def profile(self, config: EngineConfig, cost: Cost) -> DraftProfile | None:
        """How the drafts of a config fare; None where it has none, or nothing is known of them.

        `cost` is that of the steps of the model that is drafted for.
        """
        known = self._known(config)
        if known is not None or not self.guesses or config.speculative_method == "none":
            return known
        work = StepWork.of_decodes(1, CONTEXT)
        return _guess(config, cost.device_seconds(work) + cost.host_seconds(work))

    def _known(self, config: EngineConfig) -> DraftProfile | None:
        method = config.speculative_method
        if method == "none":
            return None
        measured = self.measured.get(_key(config))
        if method in LOOKED_UP:
            traced = self._of_texts(config, measured)
            if traced is not None:
                return traced
        return measured

    def _of_texts(self, config: EngineConfig, measured: DraftProfile | None) -> DraftProfile | None:
        key = _key(config)
        if key not in self._traced:
            found = traces(self.texts, config) if len(self.texts) >= FEWEST_TEXTS else {}
            profile = None
            if found:
                profile = DraftProfile(traces=found, error=MEASURED_ERROR)
                if measured is not None:
                    profile = dataclasses.replace(profile, cost=measured.cost)
            self._traced[key] = profile
        return self._traced[key]


def _guess(config: EngineConfig, step_seconds: float) -> DraftProfile:
    """What may be so; `step_seconds` is what decoding one sequence takes."""
    method = config.speculative_method
    share = GUESSED_COST.get(method)
    cost = LOOKUP_COST
    if share is not None:
        seconds = share * step_seconds
        cost = DraftCost(base=seconds) if method == "medusa" else DraftCost(depth=seconds)
    return DraftProfile(
        GUESSED[method],
        share=GUESSED_SHARE.get(method, 1.0),
        cost=cost,
        costs_device=share is not None,
        knows=share is not None,
        error=GUESS_ERROR,
    )


def _texts(evidence: LoadEvidence) -> list[Text]:
    prompts = evidence.prompts
    return [
        (r.request_id, prompts[r.request_id], r.output_token_ids)
        for r in evidence.requests
        if r.request_id in prompts and r.output_token_ids
    ]


def _key(config: EngineConfig) -> tuple[Any, ...]:
    """What drafts hang on, beside how many are asked for."""
    lookup = (config.prompt_lookup_min, config.prompt_lookup_max, config.prompt_lookup_window)
    method = config.speculative_method
    return method, config.speculative_model, lookup if method in ("ngram", "suffix") else ()
