"""What a user asks of a simulation; told without anything heavy, so that the command is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import BadInput
from autotune.predict.drafting import DraftProfile, given_profile
from autotune.simulation.fleet import Disaggregation, Fleet, check_router
from autotune.traffic_options import TrafficOptions

# A network of 200 Gbit/s, and what starting a transfer over it takes with its handshakes.
TRANSFER_BYTES_PER_S = 25e9
TRANSFER_LATENCY_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """A configuration under a workload on a fleet; see the command's help.

    `knobs` are those that differ from the engine's defaults. `disaggregate` is the number of
    prefill and of decode replicas. `acceptance` is the chance of each drafted position to be right
    once those before it were, and `draft_s` what drafting adds to a step. `calibration` is a folder
    or file; None calibrates this machine, or reads what was kept of it unless `recalibrate`. With
    `gpu` the data sheet of that GPU tells instead.
    """

    knobs: Mapping[str, Any]
    traffic: TrafficOptions
    slo: str
    replicas: int | None = None
    router: str = "round_robin"
    disaggregate: tuple[int, int] | None = None
    transfer_bytes_per_s: float = TRANSFER_BYTES_PER_S
    transfer_latency_s: float = TRANSFER_LATENCY_S
    acceptance: tuple[float, ...] = ()
    draft_s: float = 0.0
    calibration: Path | None = None
    recalibrate: bool = False
    gpu: str | None = None
    draws: int = 20
    seed: int = 0
    drain_limit: float = 30.0

    def __post_init__(self) -> None:
        check_router(self.router)
        if self.replicas is not None and self.disaggregate is not None:
            raise BadInput(
                "--replicas and --disaggregate contradict each other: the latter says how many "
                "there are"
            )
        if self.calibration is not None and self.recalibrate:
            raise BadInput(
                "--calibration and --recalibrate contradict each other: give one of them"
            )
        if self.gpu is not None and (self.recalibrate or self.calibration is not None):
            flag = "--recalibrate" if self.recalibrate else "--calibration"
            raise BadInput(
                f"{flag} and --gpu contradict each other: with --gpu a data sheet tells the costs"
            )
        for chance in self.acceptance:
            if not 0 <= chance <= 1:
                raise BadInput(
                    f"--speculative-acceptance {chance:g}: a chance lies between 0 and 1"
                )
        if self.draft_s and not self.acceptance:
            raise BadInput("--speculative-draft-time goes with --speculative-acceptance")
        if not 0 <= self.draft_s < math.inf:
            raise BadInput(
                f"--speculative-draft-time must be at least 0 and finite, got {self.draft_s:g}"
            )
        if self.acceptance and self.knobs.get("speculative_method") == "none":
            raise BadInput(
                "--speculative-acceptance and --speculative-method none contradict each other: "
                "leave one of them out"
            )
        # What is wrong with the fleet is said before anything is measured for it.
        self.fleet(0.0)

    @property
    def drafts(self) -> DraftProfile | None:
        """How drafts fare, if that is told."""
        return given_profile(self.acceptance, self.draft_s) if self.acceptance else None

    @property
    def served_knobs(self) -> dict[str, Any]:
        """The knobs, those of speculation included that go without saying.

        Whoever tells how drafts fare, and not who drafts, asks for as many tokens in every step.
        """
        knobs = dict(self.knobs)
        if self.acceptance and "speculative_method" not in knobs:
            told = {"num_speculative_tokens": len(self.acceptance), "speculative_adaptive": False}
            knobs = {"speculative_method": "ngram", **told, **knobs}
        return knobs

    def fleet(self, kv_bytes_per_token: float) -> Fleet:
        """The engines, given the bytes of a token's keys and values."""
        router = check_router(self.router)
        if self.disaggregate is None:
            return Fleet(1 if self.replicas is None else self.replicas, router)
        split = Disaggregation(
            *self.disaggregate,
            transfer_bytes_per_s=self.transfer_bytes_per_s,
            transfer_latency_s=self.transfer_latency_s,
            kv_bytes_per_token=kv_bytes_per_token,
        )
        return Fleet(1, router, split)
