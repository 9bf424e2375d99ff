"""What speculative decoding brings the embedded pair, alone and under load, and what is foretold.

Requests continue Python source that the model has not seen. At each number of requests at once, all
methods and none go on in turns of some steps, so that a speed-up is a ratio of times at one speed
of the machine. Outputs are greedy, where the small model repeats itself, and drawn at temperature
1, where it does not.

What looking up finds is foretold from the texts of the same requests, served without drafts, as a
profile has them; what models and heads guess, from the same requests, drafted for at every step, a
few at once.

    python -m benchmarks.speculation [--medusa FOLDER] [--rounds 5] [--out speculation.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autotune.embedded import DRAFT, HELD_OUT, TARGET
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.load.open_loop import GREEDY, LoadResult, run_load
from autotune.loaded_engines import LoadedEngines
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_run import calibrate
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.intervals import misfit
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.profiling.model_facts import model_facts
from autotune.records import utc_now
from autotune.simulation.speedup import Metric, predicted_speedup
from autotune.workload.materialise import LoadRequest
from benchmarks.in_turns import Player, play_in_turns
from benchmarks.quiet_machine import undisturbed
from engine.config import MODEL_METHODS, EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate.ngram import NgramProposer
from engine.step_record import StepRecord
from engine.tokenizer import Tokenizer, load_tokenizer

OUTPUT = 128
# Requests at once; the last is more than get a seat.
BATCHES = (1, 8, 64, 256)
DRAWN_BATCHES = (1, 256)
SEATS = 128
# Texts differ in what can be guessed of them: of so many at least, to learn from and to measure.
TEXTS = 40
# Seconds between loads that are played one after another.
APART = 100.0
# Requests at once of which the drafts of models are learned, beside those that come alone.
LEARNED_AT = 16
LOOKUP_CONTEXT = 8192
RESAMPLES = 4000
DRAWS = 19


def variants(medusa: str | None) -> dict[str, dict[str, Any]]:
    """The methods, each with as many tokens as it can use on this text."""
    found: dict[str, dict[str, Any]] = {
        "none": {},
        "ngram": {"speculative_method": "ngram", "num_speculative_tokens": 8},
        "suffix": {"speculative_method": "suffix", "num_speculative_tokens": 8},
        "draft_model": {
            "speculative_method": "draft_model",
            "speculative_model": str(DRAFT),
            "num_speculative_tokens": 5,
        },
    }
    if medusa is not None:
        found["medusa"] = {
            "speculative_method": "medusa",
            "speculative_model": medusa,
            "num_speculative_tokens": 12,
        }
    found["ngram, always 8"] = {**found["ngram"], "speculative_adaptive": False}
    return found


class Texts:
    """Python source of the held-out text, as token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._files: list[list[int]] = []
        name = ""
        lines: list[str] = []
        for line in [*HELD_OUT.read_text().splitlines(keepends=True), "===== end =====\n"]:
            if line.startswith("===== ") and line.endswith(" =====\n"):
                if name.endswith(".py"):
                    self._files.append(tokenizer.encode("".join(lines)))
                name, lines = line[6:-7], []
            else:
                lines.append(line)

    def requests(self, count: int, seed: int) -> list[LoadRequest]:
        """Prompts of 100 to 400 tokens from random places, all at once."""
        rng = np.random.default_rng(seed)
        weights = np.array([len(file) for file in self._files], dtype=float)
        found = []
        for i in range(count):
            file = self._files[rng.choice(len(self._files), p=weights / weights.sum())]
            size = int(rng.integers(100, 401))
            start = int(rng.integers(0, max(1, len(file) - size)))
            found.append(LoadRequest(f"{seed}-{i}", 0.0, tuple(file[start : start + size]), OUTPUT))
        return found


class Bench:
    """Engines of the embedded model that serve one load after another."""

    def __init__(self, medusa: str | None) -> None:
        self.base = EngineConfig(
            model=str(TARGET), max_num_seqs=SEATS, kv_cache_memory_bytes=512 << 20
        )
        self.configs = {
            name: self.base.replace(**knobs) for name, knobs in variants(medusa).items()
        }
        self.engines = LoadedEngines(keep=True)
        # A method keeps its engine, and with it what it has learned.
        self._own = {name: LoadedEngines(keep=True) for name in self.configs}
        self.texts = Texts(load_tokenizer(str(TARGET)))

    def serve(
        self,
        name: str,
        loads: Sequence[Sequence[LoadRequest]],
        sampling: SamplingParams = GREEDY,
    ) -> LoadResult:
        """Serve loads one after another; the records of all, and their seconds together."""
        return self.serve_with(self.configs[name], loads, sampling)

    def play(
        self, loads: Sequence[Sequence[LoadRequest]], sampling: SamplingParams
    ) -> dict[str, Player]:
        """All methods serve the loads, in short turns."""
        players = {
            name: Player(self._own[name].engine(config), loads, sampling)
            for name, config in self.configs.items()
        }
        play_in_turns(players)
        return players

    def serve_with(
        self,
        config: EngineConfig,
        loads: Sequence[Sequence[LoadRequest]],
        sampling: SamplingParams = GREEDY,
    ) -> LoadResult:
        """The same with a config."""
        engine = self.engines.engine(config)
        results = []
        for load in loads:
            engine.clear_prefix_cache()
            results.append(run_load(engine, load, drain_limit=600.0, sampling=sampling))
        first = results[0]
        return dataclasses.replace(
            first,
            records=[record for result in results for record in result.records],
            steps=[step for result in results for step in result.steps],
            duration=sum(result.duration for result in results),
        )


def loads_of(batch: int, texts: Texts, seed: int) -> list[list[LoadRequest]]:
    """Loads of so many requests at once, to be served one after another."""
    loads = math.ceil(TEXTS / batch)
    requests = texts.requests(loads * batch, seed)
    return [requests[i * batch : (i + 1) * batch] for i in range(loads)]


def regrouped(loads: Sequence[Sequence[LoadRequest]]) -> list[Sequence[LoadRequest]]:
    """The same requests, `LEARNED_AT` at once; those that come alone as they are."""
    alone = [load for load in loads if len(load) == 1]
    others = [request for load in loads if len(load) > 1 for request in load]
    together = [others[i : i + LEARNED_AT] for i in range(0, len(others), LEARNED_AT)]
    return [*alone, *together]


def metric_at(batch: int) -> Metric:
    """What tells a speed-up: where more requests come than have seats, tokens a second."""
    return "throughput" if batch > SEATS else "tpot"


def drafts(recorded: Sequence[StepRecord]) -> dict[str, Any]:
    """What was drafted and accepted, for the record."""
    steps = [s for s in recorded if s.decode_sequences]
    decodes = sum(s.decode_sequences for s in steps)
    accepted = sum(s.accepted_tokens for s in steps)
    return {
        "tokens_per_step": (decodes + accepted) / decodes,
        "drafted_per_decode": sum(s.drafted_tokens for s in steps) / decodes,
        "accepted_share": accepted / max(1, sum(s.drafted_tokens for s in steps)),
        "draft_share_of_time": sum(s.draft_seconds for s in steps) / sum(s.seconds for s in steps),
    }


def measured(
    bench: Bench, rounds: int, batches: Sequence[int], sampling: SamplingParams
) -> dict[str, Any]:
    """Every method at every number of requests, in short turns."""
    found: dict[str, Any] = {}
    for batch in batches:
        loads = loads_of(batch, bench.texts, 1000 + batch)
        play = partial(bench.play, loads, sampling)
        if not found:  # what is done once, such as measuring costs, is done
            bench.play(loads_of(4, bench.texts, 99), sampling)
        runs, others = zip(*(undisturbed(play) for _ in range(rounds)), strict=True)
        found[str(batch)] = {
            "others": max(share or 0.0 for share in others),
            "methods": {
                name: summary([run["none"] for run in runs], [run[name] for run in runs])
                for name in bench.configs
            },
        }
        for name, told in found[str(batch)]["methods"].items():
            print(
                f"{batch:4} at once, T={sampling.temperature:g}  {name:16} "
                f"tpot {told['tpot_s'] * 1e3:7.2f} ms  "
                f"{told['tpot_speedup']:.3f}x ({told['tpot_low']:.3f} to {told['tpot_high']:.3f})  "
                f"throughput {told['throughput_speedup']:.3f}x  "
                f"{told['tokens_per_step']:.2f} tokens a step",
                flush=True,
            )
    return found


def summary(plain: Sequence[Player], runs: Sequence[Player]) -> dict[str, Any]:
    """A method beside none, round by round: medians, and an interval of the median."""
    by_tpot = [a.tpot() / b.tpot() for a, b in zip(plain, runs, strict=True)]
    by_throughput = [b.throughput() / a.throughput() for a, b in zip(plain, runs, strict=True)]
    low, high = median_interval(by_tpot)
    slow, fast = median_interval(by_throughput)
    return {
        "tpot_s": statistics.median(run.tpot() for run in runs),
        "tpot_speedup": statistics.median(by_tpot),
        "tpot_low": low,
        "tpot_high": high,
        "tpot_speedups": by_tpot,
        "throughput_speedup": statistics.median(by_throughput),
        "throughput_low": slow,
        "throughput_high": fast,
        "throughput_speedups": by_throughput,
        **drafts([step for run in runs for step in run.steps]),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% of the medians of resampled values."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.array(values), (RESAMPLES, len(values))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def learned(bench: Bench) -> tuple[Calibration, dict[str, DraftKnowledge]]:
    """What steps cost, and how each method's drafts fare, as far as it is known beforehand."""
    config = bench.base
    calibration = calibrate(
        config,
        model_facts(config),
        bench.engines,
        hardware=describe_hardware("cpu"),
    )
    each = {batch: loads_of(batch, bench.texts, 1000 + batch) for batch in BATCHES}
    offered = [load for loads in each.values() for load in loads]
    plain = bench.serve("none", offered)
    prompts = prompts_of([request for load in offered for request in load])
    served = bench.configs["none"], LoadEvidence(plain.records, plain.steps, prompts)
    # Of more requests than get a seat, texts are as those of others.
    drafted_for = regrouped([load for batch in BATCHES if batch <= SEATS for load in each[batch]])
    knowledge = {}
    drafted = [CalibrationLoad(bench.base, plain.steps, plain.records, "sweep")]
    for name, config in bench.configs.items():
        if name == "none":
            continue
        # Of models' drafts of all lengths, whatever pays.
        if config.speculative_method in MODEL_METHODS:
            config = config.replace(speculative_adaptive=False)
        result = bench.serve_with(config, drafted_for)
        knowledge[name] = DraftKnowledge.of(
            [served, (config, LoadEvidence(result.records, result.steps))]
        )
        drafted.append(CalibrationLoad(config, result.steps, result.records, "sweep"))
    return calibration.refitted(drafted), knowledge


def foretold(
    bench: Bench, calibration: Calibration, knowledge: Mapping[str, DraftKnowledge]
) -> dict[str, Any]:
    """The speed-up of every method at every number of requests, from what was learned before."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        load = [
            dataclasses.replace(request, arrival_s=i * APART)
            for i, load in enumerate(loads_of(batch, bench.texts, 1000 + batch))
            for request in load
        ]
        found[str(batch)] = {}
        print(f"foretelling {batch} at once", flush=True)
        for name, known in knowledge.items():
            config = bench.configs[name]
            model = dataclasses.replace(calibration, drafts=known)
            told = predicted_speedup(
                load,
                bench.base,
                config,
                model,
                metric=metric_at(batch),
                draws=DRAWS,
                noise=misfit(calibration.median_error),
            )
            found[str(batch)][name] = {"value": told.value, "low": told.low, "high": told.high}
    return found


def compared(predictions: Mapping[str, Any], measurements: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of what was foretold; throughput where more requests come than have seats."""
    lines = []
    for batch, methods in predictions.items():
        metric = metric_at(int(batch))
        for name, interval in methods.items():
            got = measurements[batch]["methods"][name][f"{metric}_speedup"]
            lines.append(
                {
                    "batch": int(batch),
                    "method": name,
                    "metric": metric,
                    "predicted": interval,
                    "measured": got,
                    "error": interval["value"] / got - 1.0,
                    "inside": interval["low"] <= got <= interval["high"],
                }
            )
            print(
                f"{batch:>4} at once  {name:16} {metric:10} foretold {interval['value']:.2f}x "
                f"({interval['low']:.2f} to {interval['high']:.2f}), measured {got:.2f}x"
            )
    errors = [abs(line["error"]) for line in lines]
    return {
        "lines": lines,
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "within_10_percent": sum(e <= 0.1 for e in errors) / len(errors),
        "inside": sum(line["inside"] for line in lines) / len(lines),
    }


def lookup_seconds() -> dict[str, float]:
    """Seconds that n-gram drafting takes a request and step, by the text, at a long context."""
    rng = np.random.default_rng(0)
    texts: dict[str, Callable[[], list[int]]] = {
        "random tokens": lambda: rng.integers(0, 4096, LOOKUP_CONTEXT).tolist(),
        "few different tokens": lambda: rng.integers(0, 8, LOOKUP_CONTEXT).tolist(),
        "a loop": lambda: (rng.integers(0, 4096, 37).tolist() * 300)[:LOOKUP_CONTEXT],
    }
    found = {}
    for name, text in texts.items():
        proposer = NgramProposer(EngineConfig(speculative_method="ngram"))
        request = Request("0", text(), SamplingParams(temperature=0.0), 0.0)
        proposer.propose([request], [8])
        taken = []
        for _ in range(2000):
            request.token_ids.append(request.token_ids[-37])
            began = time.perf_counter()
            proposer.propose([request], [8])
            taken.append(time.perf_counter() - began)
        found[name] = statistics.median(taken)
        print(f"looking up in {LOOKUP_CONTEXT} tokens, {name}: {found[name] * 1e6:.1f} us")
    return found


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--medusa", help="folder of `autotune train-medusa`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    bench = Bench(options.medusa)
    lookup, _ = undisturbed(lookup_seconds)
    (calibration, knowledge), _ = undisturbed(partial(learned, bench))
    measurements = measured(bench, options.rounds, BATCHES, GREEDY)
    drawn = measured(bench, options.rounds, DRAWN_BATCHES, SamplingParams(temperature=1.0))
    predictions = foretold(bench, calibration, knowledge)
    report = {
        "machine": describe_hardware("cpu"),
        "versions": library_versions(),
        "at": utc_now(),
        "output_tokens": OUTPUT,
        "seats": SEATS,
        "rounds": options.rounds,
        "configs": json.loads(
            json.dumps(variants(options.medusa and "heads")).replace(str(DRAFT), DRAFT.name)
        ),
        "measured": measurements,
        "measured_at_temperature_1": drawn,
        "predicted": compared(predictions, measurements),
        "ngram_seconds": lookup,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
