"""What a configuration or a technique would come to, from a profile."""

from __future__ import annotations

from typing import Any, Protocol

from autotune.predict.change import Change
from autotune.predict.formula_predictor import FormulaPredictor
from autotune.predict.gain import Basis, PredictedGain
from autotune.predict.replay_predictor import replay_predictor
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import Profile
from autotune.slo import Slo

NO_CHANGE = Change()


class Predictor(Protocol):
    """Predicts metrics and gains of changes to what was profiled."""

    @property
    def basis(self) -> Basis:
        """How it predicts."""
        ...

    def metrics(
        self, change: Change = NO_CHANGE, rate_factor: float | None = 1.0
    ) -> dict[str, Any] | None:
        """Metrics after a change, by the keys of `bench`; None where they cannot be predicted.

        `rate_factor` multiplies the arrival rate; None offers all requests at once.
        """
        ...

    def gains(self, change: Change) -> tuple[PredictedGain, ...]:
        """Gains over what was profiled, for each metric that can be judged.

        Latencies have the statistic of the SLO's limit, or p95. None at all for a change that the
        engine refuses or whose effect is not known.
        """
        ...


def predictor_for(
    profile: Profile,
    evidence: LoadEvidence | None,
    slo: Slo | None,
    *,
    seed: int,
    budget_s: float,
) -> Predictor:
    """The best predictor that a profile allows.

    A replay where the steps' cost was fitted, parts of it were probed and requests are known; the
    profile's shares otherwise.

    Args:
        profile: what was measured.
        evidence: the records that it was made of.
        slo: names the statistics that gains are told of.
        seed: of what is drawn.
        budget_s: seconds that all of its predictions may take, about: it decides how much of the
            traffic is replayed, so that predictions do not depend on the machine's speed.
    """
    found = replay_predictor(profile, evidence, slo, seed=seed, budget_s=budget_s)
    return FormulaPredictor(profile, slo) if found is None else found
