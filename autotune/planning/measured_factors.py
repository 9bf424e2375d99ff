"""What a calibration on one such GPU says of the factors on its data sheet.

A calibration knows one model on one machine; a plan asks for other methods, ranks and models on
GPUs of that kind. What carries over is how far each part of a step is from what the catalogue
expects of it: reading weights, arithmetic, attention of prompts, reading the cache, latencies,
communication, the host. These factors are fitted to the calibration's costs of steps by Bayesian
linear regression (Bishop 2006, section 3.3): the catalogue's spread is the prior, so a part that
the calibration says nothing of keeps its width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.hardware.catalogue import Gpu
from autotune.hardware.efficiency import Efficiency, Factors
from autotune.planning.catalogue_cost import CatalogueCost
from autotune.planning.device_rates import Guess
from autotune.planning.memory import longest_served, served_shape
from autotune.planning.model_shape import Experts, ModelShape
from autotune.predict.calibration import Calibration
from autotune.predict.step_cost import TERMS, StepWork
from autotune.predict.virtual_engine import Cost
from autotune.profiling.schema import ModelFacts
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS

PARTS = (*TERMS, "host")
# Draws from which the prior's width is told.
_PRIOR_DRAWS = 64
# A part of a step that a calibration tells is off by as much as its fit in any case, and no part
# is known better than this beside.
_LEAST_ERROR = 0.03
# All parts together may be so much off the catalogue, beside what each of them is: a clock that is
# held down, a stack that is slow at everything. What was measured of some parts tells it of all.
_LEVEL = 0.3
# Bounds of a fitted factor: beyond them the calibration is of something else.
_LIMITS = (0.2, 6.0)
# Which fields of the catalogue's factors make up which part. Shares are divided, times multiplied.
_SHARES = {
    "bandwidth": "weights",
    "matmul": "linear_compute",
    "prefill_attention": "prefill_attention",
    "decode_attention": "kv_reads",
    "all_reduce": "communication",
}
_TIMES = {
    "attention_latency": "overhead",
    "kernel_latency": "overhead",
    "eager_kernel_latency": "overhead",
    "all_reduce_latency": "communication",
    "step_overhead": "host",
    "sequence_overhead": "host",
}


@dataclass(frozen=True)
class MeasuredFactors:
    """How many times as long PARTS take as the catalogue's middle says.

    `mean` and `root` are of a normal distribution, root @ root.T its covariance; `whole` is the
    standard deviation of the logarithm of all times together: another such machine, another day.
    `measured` names for each of the catalogue's fields which of its factors were measured, by
    their keys: what other methods achieve beside them is as unsure as without a calibration.
    """

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    whole: float
    measured: Mapping[str, Any]

    def middle(self, efficiency: Efficiency) -> Guess:
        """The likeliest guess."""
        return _scaled(Guess.middle(efficiency), dict(zip(PARTS, self.mean, strict=True)))

    def drawn(self, efficiency: Efficiency, rng: np.random.Generator) -> Guess:
        """A guess that may be so; what was not measured is drawn as without a calibration."""
        unmeasured = Guess.drawn(efficiency, rng)
        normal = rng.standard_normal(len(PARTS) + 1)
        factors = np.clip(self.mean + self.root @ normal[:-1], *_LIMITS)
        expected = Guess.middle(efficiency)
        guess = _scaled(expected, dict(zip(PARTS, factors, strict=True)))
        return dataclasses.replace(
            guess,
            factors=self._beside(guess.factors, expected.factors, unmeasured.factors),
            widening=unmeasured.widening,
            expert_reads=unmeasured.expert_reads,
            expert_compute=unmeasured.expert_compute,
            arrival=unmeasured.arrival,
            whole_step=math.exp(self.whole * float(normal[-1])),
        )

    def _beside(
        self, guess: Factors[float], expected: Factors[float], drawn: Factors[float]
    ) -> Factors[float]:
        """The guess with factors of methods that were not measured drawn beside those that were."""
        changed: dict[str, Any] = {}
        for name, key in self.measured.items():
            factors, middle, other = (getattr(f, name) for f in (guess, expected, drawn))
            known = other[key] / middle[key] if key in middle else 1.0
            changed[name] = {k: f * (other[k] / middle[k]) / known for k, f in factors.items()}
        return dataclasses.replace(guess, **changed)


def measured_factors(
    calibration: Calibration, shape: ModelShape, gpu: Gpu, efficiency: Efficiency
) -> MeasuredFactors:
    """The factors by a calibration that was made on such a GPU.

    Args:
        calibration: of any model; the more of its configurations were measured, the better.
        shape: the model that is planned for; where the calibration is of it, its exact sizes count.
        gpu: what the calibration was made on.
        efficiency: the catalogue's factors of it.

    Raises:
        autotune.predict.apply.NotPredictable: the calibration tells nothing of its own config.
    """
    config, facts = calibration.config, calibration.model
    measured = shape if is_of(shape, facts) else shape_of_facts(facts)
    fits = calibration.fits
    whole = math.sqrt(fits.drift**2 + fits.level**2 + calibration.wider**2)
    return fit_factors(
        calibration.middle(config).cost,
        config,
        measured,
        gpu,
        efficiency,
        error=max(_LEAST_ERROR, calibration.median_error),
        whole=whole,
        pace=fits.pace,
    )


def fit_factors(
    cost: Cost,
    config: EngineConfig,
    shape: ModelShape,
    gpu: Gpu,
    efficiency: Efficiency,
    *,
    error: float,
    whole: float,
    pace: float = 1.0,
) -> MeasuredFactors:
    """The factors by which the catalogue's parts make up a known cost of steps.

    Args:
        cost: known under `config`.
        config: the knobs that it is of.
        shape: the model that it is of.
        gpu: what it is of.
        efficiency: the catalogue's factors.
        error: relative error of the known cost of a step.
        whole: as of MeasuredFactors.
        pace: how many times as long steps take as `cost` says.
    """
    shape = served_shape(shape, config)
    works = _works(shape, config)

    def parts(guess: Guess) -> NDArray[np.float64]:
        """Seconds [works, PARTS]."""
        rates = guess.rates(gpu, shape.dtype, config.tensor_parallel_size)
        sheet = CatalogueCost(shape, config, rates)
        return np.array([[*sheet.terms(work).values(), sheet.host_seconds(work)] for work in works])

    middle = parts(Guess.middle(efficiency))
    rng = np.random.default_rng(0)
    sums = np.array([parts(Guess.drawn(efficiency, rng)).sum(0) for _ in range(_PRIOR_DRAWS)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(middle.sum(0) > 0, sums / middle.sum(0), 1.0)
    prior = np.maximum(ratios.std(0), 0.02)
    told = np.array([pace * (cost.device_seconds(w) + cost.host_seconds(w)) for w in works])
    # Relative errors: every step counts alike, however long it is.
    design = middle / told[:, None] / error
    left = (1.0 - (middle / told[:, None]).sum(1)) / error
    before = np.diag(prior**2) + np.full((len(PARTS), len(PARTS)), _LEVEL**2)
    covariance = np.linalg.inv(np.linalg.inv(before) + design.T @ design)
    mean = np.clip(1.0 + covariance @ (design.T @ left), *_LIMITS)
    return MeasuredFactors(mean, np.linalg.cholesky(covariance), whole, _keys(shape, config, gpu))


def _keys(shape: ModelShape, config: EngineConfig, gpu: Gpu) -> dict[str, Any]:
    """Which of a field's factors a config's steps are made of."""
    method = METHODS[config.quantization]
    stored = shape.stored if method.name == "none" else None
    bits = stored.bits if stored else method.weight_bits
    activation = stored.activation if stored else method.activation
    half = "bf16" if "bf16" in gpu.rates else "fp16"
    return {
        "bandwidth": 16 if bits > 8 else 8 if bits > 5 else 4,
        "matmul": activation if activation in gpu.rates else half,
        "decode_attention": 16 if config.kv_cache_dtype == "auto" else 8,
    }


def is_of(shape: ModelShape, facts: ModelFacts) -> bool:
    """Whether facts are those of a shape, as far as sizes tell."""
    return (
        shape.num_layers == facts.num_layers
        and shape.hidden_size == facts.hidden_size
        and shape.num_heads == facts.num_heads
        and shape.vocab_size == facts.vocab_size
        and abs(shape.num_parameters - facts.parameters) <= 0.001 * facts.parameters
    )


def shape_of_facts(facts: ModelFacts) -> ModelShape:
    """A shape with a model's facts; what these do not tell is as in a Llama of that size."""
    hidden, layers = facts.hidden_size, facts.num_layers
    attention = hidden * facts.head_dim * 2 * (facts.num_heads + facts.num_kv_heads)
    each = max(1.0, facts.matmul_parameters / layers - attention)
    experts, inner = None, max(1, round(each / (3 * hidden)))
    if facts.num_experts > 1 and facts.experts_per_token:
        size = max(1, round(inner / facts.experts_per_token))
        has = (True,) * layers
        experts = Experts(facts.num_experts, facts.experts_per_token, size, has)
    embeddings = facts.parameters - facts.matmul_parameters - facts.head_parameters
    return ModelShape(
        name=facts.name,
        architecture=facts.architecture or "unknown",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        vocab_size=facts.vocab_size,
        max_position=facts.max_model_len,
        tie_word_embeddings=experts is None and embeddings < facts.head_parameters / 2,
        dtype=facts.dtype,
        layer_windows=(0,) * layers,
        experts=experts,
    )


def _works(shape: ModelShape, config: EngineConfig) -> list[StepWork]:
    """Steps as a calibration has them: decodes of few and many, short and long, and prompts."""
    longest = min(longest_served(shape, config), 8192)
    most = min(config.max_num_seqs, 128)
    works = []
    for sequences in sorted({1, min(8, most), min(32, most), most}):
        for context in (longest // 16 + 1, longest // 2):
            seen = sequences * context
            works.append(StepWork(sequences, 0, sequences, sequences, seen, 0, 0))
    budget = min(config.max_num_batched_tokens, longest)
    works += [StepWork.of_prompt(tokens) for tokens in (budget // 8 + 1, budget // 2 + 1, budget)]
    pairs = budget * (budget + 1) // 2
    rows = budget + most
    works.append(StepWork(rows, 1, most, most + 1, most * longest // 4, budget, pairs))
    return works


def _scaled(guess: Guess, by: Mapping[str, Any]) -> Guess:
    """A guess whose parts take so many times as long."""

    def change(name: str, factor: float) -> float:
        if name in _SHARES:
            return factor / float(by[_SHARES[name]])
        return factor * float(by[_TIMES[name]])

    return dataclasses.replace(guess, factors=guess.factors.each(change))
